// strata-runc stands between containerd and runc. Before "create" and "exec" it takes out of the process's capability sets what
// this machine's root does not have itself, then becomes runc.
//
// Why: runc refuses a privileged container when one of the wanted capabilities is missing from its own bounding set ("unable to
// apply caps: operation not permitted"), and small virtual machines often withhold CAP_SYS_RESOURCE. Where root has every
// capability this program changes nothing.
package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
)

// Linux's capabilities by number, as include/uapi/linux/capability.h counts them.
var names = strings.Fields(`CHOWN DAC_OVERRIDE DAC_READ_SEARCH FOWNER FSETID KILL SETGID SETUID SETPCAP LINUX_IMMUTABLE
NET_BIND_SERVICE NET_BROADCAST NET_ADMIN NET_RAW IPC_LOCK IPC_OWNER SYS_MODULE SYS_RAWIO SYS_CHROOT SYS_PTRACE SYS_PACCT
SYS_ADMIN SYS_BOOT SYS_NICE SYS_RESOURCE SYS_TIME SYS_TTY_CONFIG MKNOD LEASE AUDIT_WRITE AUDIT_CONTROL SETFCAP
MAC_OVERRIDE MAC_ADMIN SYSLOG WAKE_ALARM BLOCK_SUSPEND AUDIT_READ PERFMON BPF CHECKPOINT_RESTORE`)

func main() {
	if err := run(os.Args); err != nil {
		fmt.Fprintln(os.Stderr, "strata-runc:", err)
		os.Exit(1)
	}
}

// run edits what the command is about to use and replaces this process by runc.
func run(args []string) error {
	verb, bundle, process := parse(args[1:])
	switch {
	case verb == "create" || verb == "run":
		// The bundle's configuration holds the process under a key of its own.
		if err := edit(filepath.Join(bundle, "config.json"), func(config map[string]any) {
			if p, ok := config["process"].(map[string]any); ok {
				restrict(p)
			}
		}); err != nil {
			return err
		}
	case verb == "exec" && process != "":
		if err := edit(process, restrict); err != nil {
			return err
		}
	}
	runc, err := exec.LookPath("runc")
	if err != nil {
		return err
	}
	return syscall.Exec(runc, append([]string{"runc"}, args[1:]...), os.Environ())
}

// parse finds runc's command and the two options that name the files to edit; the bundle is the working folder by default.
func parse(args []string) (verb, bundle, process string) {
	bundle = "."
	for i, arg := range args {
		next := ""
		if i+1 < len(args) {
			next = args[i+1]
		}
		switch arg {
		case "create", "run", "exec":
			if verb == "" {
				verb = arg
			}
		case "--bundle", "-b":
			bundle = next
		case "--process", "-p":
			process = next
		}
	}
	return verb, bundle, process
}

// edit rewrites one JSON object in place.
func edit(file string, change func(map[string]any)) error {
	data, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	// Numbers stay text: a 64-bit limit would not survive as a float.
	decoder := json.NewDecoder(bytes.NewReader(data))
	decoder.UseNumber()
	var object map[string]any
	if err := decoder.Decode(&object); err != nil {
		return fmt.Errorf("%s: %w", file, err)
	}
	change(object)
	if data, err = json.Marshal(object); err != nil {
		return fmt.Errorf("%s: %w", file, err)
	}
	return os.WriteFile(file, data, 0o600)
}

// restrict takes the capabilities out of a process that this one lacks.
func restrict(process map[string]any) {
	lacking := missing()
	sets, _ := process["capabilities"].(map[string]any)
	for name, set := range sets {
		list, _ := set.([]any)
		keep := []any{}
		for _, capability := range list {
			if s, _ := capability.(string); !lacking[s] {
				keep = append(keep, capability)
			}
		}
		sets[name] = keep
	}
}

// missing reads this process's bounding set and names what is not in it.
func missing() map[string]bool {
	lacking := map[string]bool{}
	status, _ := os.ReadFile("/proc/self/status")
	for _, line := range strings.Split(string(status), "\n") {
		hex, ok := strings.CutPrefix(line, "CapBnd:")
		if !ok {
			continue
		}
		bounding, _ := strconv.ParseUint(strings.TrimSpace(hex), 16, 64)
		for number, name := range names {
			if bounding>>number&1 == 0 {
				lacking["CAP_"+name] = true
			}
		}
	}
	return lacking
}
