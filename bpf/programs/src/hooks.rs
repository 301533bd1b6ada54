//! The hooks.
mod connect;
mod dns;
mod names;
mod sk_lookup;
mod sock_addr;
mod tc;
