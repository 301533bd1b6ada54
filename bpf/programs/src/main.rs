//! The kernel programs: each hook turns its context into arguments, asks `strata-bpf-core`, and carries the decision
//! out. One file a kind of hook; v4 and v6 variants differ in how an address is read and written only.
#![no_std]
#![no_main]

mod events;
mod hooks;
mod maps;

/// The kernel wants to know; nothing used here is reserved to GPL programs.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 11] = *b"Apache-2.0\0";

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    // Never linked in: the verifier would refuse the loop. Nothing in the programs can panic.
    loop {}
}
