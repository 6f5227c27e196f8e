//! The three system calls that no crate we use offers safely.
#![allow(
    unsafe_code,
    reason = "an ioctl and a poll on file descriptors that we own, and a clock"
)]

use kvm_bindings::{KVMIO, kvm_ioeventfd};
use kvm_ioctls::VmFd;
use std::os::fd::AsRawFd;
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::ioctl::ioctl_with_ref;
use vmm_sys_util::ioctl_iow_nr;

ioctl_iow_nr!(KVM_IOEVENTFD, KVMIO, 0x79, kvm_ioeventfd);

/// `KVM_IOEVENTFD` as it is. kvm-ioctls' wrapper takes the width from the type of the value to
/// match, so it cannot say "this width, any value", nor choose a width at run time.
pub(crate) fn ioeventfd(vm: &VmFd, request: &kvm_ioeventfd) -> Result<(), kvm_ioctls::Error> {
    // SAFETY: `vm` is an open VM descriptor, and KVM only reads the structure that is the argument
    // of this request; it keeps a reference to the eventfd itself, not to the descriptor.
    match unsafe { ioctl_with_ref(vm, KVM_IOEVENTFD(), request) } {
        0 => Ok(()),
        _ => Err(kvm_ioctls::Error::last()),
    }
}

/// Whether somebody has written the eventfd since it was last read; it is not read here.
pub(crate) fn is_readable(event: &EventFd) -> bool {
    let mut poll = libc::pollfd {
        fd: event.as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    };
    // SAFETY: `poll` is one valid pollfd and 1 is its count; a timeout of 0 returns at once.
    let ready = unsafe { libc::poll(&raw mut poll, 1, 0) };
    ready == 1 && poll.revents & libc::POLLIN != 0
}

/// The host's monotonic clock, by which KVM says when a PIT channel was loaded.
pub(crate) fn monotonic_ns() -> i64 {
    let mut now = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: `now` is one valid timespec, which the call writes; this clock always exists.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut now) };
    now.tv_sec * 1_000_000_000 + now.tv_nsec
}
