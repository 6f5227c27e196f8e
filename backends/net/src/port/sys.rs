//! The system calls of a tap and its link that libc has no safe form for.
//!
//! Each function is one ioctl, one vectored read or write, or one socket, with its argument
//! checked by type. Kernel: Documentation/networking/tuntap.rst; `man 7 netdevice`, `rtnetlink`.

#![expect(
    unsafe_code,
    reason = "ioctl, readv and writev on a tap; a netlink socket"
)]

use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use libc::{c_int, c_ulong, ifreq};

use super::frame::Frame;

/// The interface name field of `ifreq`, NUL included.
const NAME_LEN: usize = libc::IFNAMSIZ;

fn check(result: c_int) -> io::Result<c_int> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

/// An `ifreq` that names an interface; `name` must be shorter than [`NAME_LEN`].
fn request(name: &str) -> io::Result<ifreq> {
    if name.len() >= NAME_LEN {
        return Err(io::Error::from_raw_os_error(libc::ENAMETOOLONG));
    }
    // SAFETY: ifreq is plain data (arrays and a union of integers), for which zeros are valid.
    let mut request: ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from.cast_signed();
    }
    Ok(request)
}

fn name_of(request: &ifreq) -> String {
    let bytes: Vec<u8> = request.ifr_name.iter().map(|c| c.cast_unsigned()).collect();
    CStr::from_bytes_until_nul(&bytes)
        .map(|c| c.to_string_lossy().into_owned())
        .unwrap_or_default()
}

/// Issues an ioctl that takes a pointer to an `ifreq`.
fn with_ifreq(fd: BorrowedFd<'_>, command: c_ulong, request: &mut ifreq) -> io::Result<()> {
    // SAFETY: every command passed by this module (TUNSETIFF, TUNGETIFF, TUNSETQUEUE, SIOC*IF*)
    // reads and writes at most one ifreq, which `request` is, exclusively borrowed.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), command as _, request as *mut ifreq) }).map(drop)
}

/// TUNSETIFF: attaches `fd`, a fresh /dev/net/tun, to the interface `name`.
pub(super) fn set_iff(fd: BorrowedFd<'_>, name: &str, flags: c_int) -> io::Result<()> {
    let mut request = request(name)?;
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    with_ifreq(fd, libc::TUNSETIFF as c_ulong, &mut request)
}

/// TUNGETIFF: name and flags of the interface that `fd` is attached to.
pub(super) fn get_iff(fd: BorrowedFd<'_>) -> io::Result<(String, c_int)> {
    let mut request = request("")?;
    with_ifreq(fd, libc::TUNGETIFF as c_ulong, &mut request)?;
    // SAFETY: TUNGETIFF succeeded and so filled the flags member of the union.
    let flags = unsafe { request.ifr_ifru.ifru_flags };
    Ok((name_of(&request), c_int::from(flags.cast_unsigned())))
}

/// TUNSETQUEUE: attaches or detaches one queue of a multi-queue tap.
pub(super) fn set_queue(fd: BorrowedFd<'_>, attached: bool) -> io::Result<()> {
    let mut request = request("")?;
    let flag = if attached {
        libc::IFF_ATTACH_QUEUE
    } else {
        libc::IFF_DETACH_QUEUE
    };
    request.ifr_ifru.ifru_flags = flag as libc::c_short;
    with_ifreq(fd, libc::TUNSETQUEUE as c_ulong, &mut request)
}

/// TUNSETVNETHDRSZ: length of the header in front of every frame, for all queues.
pub(super) fn set_vnet_hdr_size(fd: BorrowedFd<'_>, len: usize) -> io::Result<()> {
    let len = len as c_int;
    // SAFETY: TUNSETVNETHDRSZ reads one int, which outlives the call.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETVNETHDRSZ as _, &raw const len) })
        .map(drop)
}

/// TUNSETOFFLOAD: TUN_F_* bits of what the reader takes, for all queues.
pub(super) fn set_offload(fd: BorrowedFd<'_>, bits: u32) -> io::Result<()> {
    // SAFETY: TUNSETOFFLOAD takes its argument by value.
    check(unsafe {
        libc::ioctl(
            fd.as_raw_fd(),
            libc::TUNSETOFFLOAD as _,
            c_ulong::from(bits),
        )
    })
    .map(drop)
}

/// TUNGETSNDBUF: bytes of sent frames that the host may hold before `fd` is full.
pub(super) fn send_buffer(fd: BorrowedFd<'_>) -> io::Result<c_int> {
    let mut bytes: c_int = 0;
    // SAFETY: TUNGETSNDBUF writes one int, exclusively borrowed.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNGETSNDBUF as _, &raw mut bytes) })?;
    Ok(bytes)
}

/// Makes reads and writes of `fd` return WouldBlock instead of waiting.
pub(super) fn set_nonblocking(fd: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: F_GETFL and F_SETFL take and return integers.
    let flags = check(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GETFL) })?;
    // SAFETY: as above.
    check(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, flags | libc::O_NONBLOCK) }).map(drop)
}

/// A duplicate of the descriptor number `fd`, closed on exec.
pub(super) fn duplicate(fd: c_int) -> io::Result<OwnedFd> {
    // SAFETY: F_DUPFD_CLOEXEC takes integers; an `fd` that is not open gives EBADF.
    let copy = check(unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 3) })?;
    // SAFETY: the call just made `copy`, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(copy) })
}

/// Index of the interface `name` in this network namespace.
pub(super) fn if_index(name: &str) -> Option<u32> {
    let name = CString::new(name).ok()?;
    // SAFETY: a NUL-terminated string that outlives the call.
    let index = unsafe { libc::if_nametoindex(name.as_ptr()) };
    (index != 0).then_some(index)
}

/// A socket to name interfaces on.
pub(super) fn control_socket() -> io::Result<OwnedFd> {
    // SAFETY: socket takes integers.
    let fd =
        check(unsafe { libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) })?;
    // SAFETY: the call just made `fd`, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// SIOCGIFMTU.
pub(super) fn mtu(socket: BorrowedFd<'_>, name: &str) -> io::Result<c_int> {
    let mut request = request(name)?;
    with_ifreq(socket, libc::SIOCGIFMTU, &mut request)?;
    // SAFETY: SIOCGIFMTU succeeded and so filled the mtu member of the union.
    Ok(unsafe { request.ifr_ifru.ifru_mtu })
}

/// SIOCSIFMTU.
pub(super) fn set_mtu(socket: BorrowedFd<'_>, name: &str, mtu: u16) -> io::Result<()> {
    let mut request = request(name)?;
    request.ifr_ifru.ifru_mtu = c_int::from(mtu);
    with_ifreq(socket, libc::SIOCSIFMTU, &mut request)
}

/// Whether the interface is set up (IFF_UP).
pub(super) fn is_up(socket: BorrowedFd<'_>, name: &str) -> io::Result<bool> {
    let mut request = request(name)?;
    with_ifreq(socket, libc::SIOCGIFFLAGS, &mut request)?;
    // SAFETY: SIOCGIFFLAGS succeeded and so filled the flags member of the union.
    let flags = unsafe { request.ifr_ifru.ifru_flags };
    Ok(c_int::from(flags) & libc::IFF_UP != 0)
}

/// Sets the interface up.
pub(super) fn set_up(socket: BorrowedFd<'_>, name: &str) -> io::Result<()> {
    let mut request = request(name)?;
    with_ifreq(socket, libc::SIOCGIFFLAGS, &mut request)?;
    // SAFETY: SIOCGIFFLAGS succeeded and so filled the flags member of the union.
    let flags = unsafe { request.ifr_ifru.ifru_flags };
    request.ifr_ifru.ifru_flags = flags | libc::IFF_UP as libc::c_short;
    with_ifreq(socket, libc::SIOCSIFFLAGS, &mut request)
}

/// Reads one frame into the pieces.
pub(super) fn readv(fd: BorrowedFd<'_>, frame: &mut Frame<'_, '_>) -> io::Result<usize> {
    let pieces = frame.pieces();
    // SAFETY: every piece is valid for writes while `frame` is borrowed (see `Frame::pieces`), and
    // the kernel keeps none of them after the call. Guest memory may change under the kernel; no
    // Rust reference to it exists.
    let n = unsafe { libc::readv(fd.as_raw_fd(), pieces.as_ptr(), pieces.len() as c_int) };
    if n < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(n.cast_unsigned())
    }
}

/// Writes the pieces as one frame.
pub(super) fn writev(fd: BorrowedFd<'_>, frame: &Frame<'_, '_>) -> io::Result<usize> {
    let pieces = frame.pieces();
    // SAFETY: as in `readv`, for reads.
    let n = unsafe { libc::writev(fd.as_raw_fd(), pieces.as_ptr(), pieces.len() as c_int) };
    if n < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(n.cast_unsigned())
    }
}

/// A socket that hears of changes of links (RTNLGRP_LINK) in this network namespace. Reads block.
pub(super) fn link_socket() -> io::Result<OwnedFd> {
    let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC;
    // SAFETY: socket takes integers.
    let fd = check(unsafe { libc::socket(libc::AF_NETLINK, kind, libc::NETLINK_ROUTE) })?;
    // SAFETY: the call just made `fd`, and nobody else knows it.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    // SAFETY: sockaddr_nl is plain data, for which zeros are valid.
    let mut address: libc::sockaddr_nl = unsafe { std::mem::zeroed() };
    address.nl_family = libc::AF_NETLINK as libc::sa_family_t;
    address.nl_groups = libc::RTMGRP_LINK as u32;
    let len = size_of_val(&address) as libc::socklen_t;
    // SAFETY: `address` is a sockaddr_nl of `len` bytes that outlives the call.
    check(unsafe { libc::bind(fd.as_raw_fd(), (&raw const address).cast(), len) })?;
    Ok(fd)
}

/// Waits until `fd` is readable, or the time is over; whether it is.
pub(super) fn wait_readable(fd: BorrowedFd<'_>, timeout_ms: c_int) -> io::Result<bool> {
    let mut slot = libc::pollfd {
        fd: fd.as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    };
    // SAFETY: poll reads and writes one pollfd, which `slot` is, exclusively borrowed.
    check(unsafe { libc::poll(&raw mut slot, 1, timeout_ms) }).map(|ready| ready != 0)
}
