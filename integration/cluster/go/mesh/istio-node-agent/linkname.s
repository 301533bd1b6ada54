// Lets main.go declare functions without bodies, which the linker finds elsewhere.
