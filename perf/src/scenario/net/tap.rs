//! The tap: its counters, a packet socket on it, and one of our own for the limit.
#![allow(
    unsafe_code,
    reason = "ioctls on a tap and packet sockets have no std API"
)]

use std::fs::{self, File, OpenOptions};
use std::io::{Error, Result};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

use crate::sys::check;

/// What it is called in our namespace.
pub(super) const NAME: &str = "bench0";

/// What the kernel counts on the tap.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Counters {
    /// Frames written into it.
    pub(super) written: u64,
    /// Frames read from it.
    pub(super) read: u64,
    /// Frames that found its queue full.
    pub(super) dropped: u64,
}

/// None while there is no tap.
pub(super) fn counters() -> Result<Option<Counters>> {
    Ok(parse(&fs::read_to_string("/proc/thread-self/net/dev")?))
}

/// From the table of net/dev: eight numbers received, eight sent. What is written into a tap the
/// interface receives.
fn parse(table: &str) -> Option<Counters> {
    let line = table.lines().find_map(|line| {
        let (name, numbers) = line.split_once(':')?;
        (name.trim() == NAME).then_some(numbers)
    })?;
    let numbers: Vec<u64> = line
        .split_whitespace()
        .map(str::parse)
        .collect::<std::result::Result<_, _>>()
        .ok()?;
    Some(Counters {
        written: *numbers.get(1)?,
        read: *numbers.get(9)?,
        dropped: *numbers.get(11)?,
    })
}

fn named() -> libc::ifreq {
    // SAFETY: an ifreq is plain data, for which zeroes are valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(NAME.bytes()) {
        *to = from.cast_signed();
    }
    request
}

/// A tap of our own, up, without headers; reads do not wait.
pub(super) fn create() -> Result<File> {
    let tap = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open("/dev/net/tun")?;
    let mut request = named();
    request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI) as libc::c_short;
    // SAFETY: TUNSETIFF reads and writes one ifreq.
    check(unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNSETIFF as _, &raw mut request) })?;
    // SAFETY: no pointers.
    let socket = check(unsafe { libc::socket(libc::AF_INET, libc::SOCK_DGRAM, 0) })?;
    // SAFETY: just returned to us alone.
    let socket = unsafe { OwnedFd::from_raw_fd(socket) };
    let mut request = named();
    request.ifr_ifru.ifru_flags = libc::IFF_UP as libc::c_short;
    // SAFETY: SIOCSIFFLAGS reads one ifreq.
    check(unsafe {
        libc::ioctl(
            socket.as_raw_fd(),
            libc::SIOCSIFFLAGS as _,
            &raw mut request,
        )
    })?;
    Ok(tap)
}

/// A packet socket that passes by queueing disciplines and other packet sockets.
pub(super) fn packet_socket() -> Result<OwnedFd> {
    // SAFETY: no pointers. Protocol 0: it receives nothing.
    let socket = check(unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW, 0) })?;
    // SAFETY: just returned to us alone.
    let socket = unsafe { OwnedFd::from_raw_fd(socket) };
    set_option(&socket, libc::PACKET_QDISC_BYPASS, &1_i32)?;
    // All frames that go round, of any size, or sending waits for the reader.
    set(
        &socket,
        (libc::SOL_SOCKET, libc::SO_SNDBUFFORCE),
        &(4_i32 << 20),
    )?;
    Ok(socket)
}

/// Sets an option of packet sockets; `T` is what the kernel takes for it.
pub(super) fn set_option<T>(socket: &OwnedFd, option: libc::c_int, value: &T) -> Result<()> {
    set(socket, (libc::SOL_PACKET, option), value)
}

fn set<T>(socket: &OwnedFd, (level, option): (libc::c_int, libc::c_int), value: &T) -> Result<()> {
    // SAFETY: the value lives through the call and has the size that is given.
    check(unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            option,
            std::ptr::from_ref(value).cast(),
            size_of_val(value) as libc::socklen_t,
        )
    })
    .map(drop)
}

/// Binds a packet socket to the tap.
pub(super) fn bind(socket: &OwnedFd) -> Result<()> {
    let request = named();
    // SAFETY: the name ends in a zero, as it is shorter than the field.
    let index = unsafe { libc::if_nametoindex(request.ifr_name.as_ptr()) };
    if index == 0 {
        return Err(Error::last_os_error());
    }
    // SAFETY: a sockaddr_ll is plain data, for which zeroes are valid.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_ifindex = index.cast_signed();
    // SAFETY: the address lives through the call and has the size that is given.
    check(unsafe {
        libc::bind(
            socket.as_raw_fd(),
            (&raw const address).cast(),
            size_of_val(&address) as libc::socklen_t,
        )
    })
    .map(drop)
}

/// Sends frames out of the tap's interface, that is, to whoever reads the tap.
#[derive(Debug)]
pub(super) struct Sender {
    socket: OwnedFd,
}

impl Sender {
    /// A sender on the tap, which is there.
    pub(super) fn new() -> Result<Sender> {
        let socket = packet_socket()?;
        bind(&socket)?;
        Ok(Sender { socket })
    }

    /// Sends `frame` up to `count` times; how often it did.
    pub(super) fn send(&self, frame: &[u8], count: usize) -> Result<usize> {
        const BATCH: usize = 64;
        let mut piece = libc::iovec {
            iov_base: frame.as_ptr().cast_mut().cast(),
            iov_len: frame.len(),
        };
        // SAFETY: an mmsghdr is plain data, for which zeroes are valid.
        let mut message: libc::mmsghdr = unsafe { std::mem::zeroed() };
        message.msg_hdr.msg_iov = &raw mut piece;
        message.msg_hdr.msg_iovlen = 1;
        let mut messages = [message; BATCH];
        let count = count.min(BATCH) as libc::c_uint;
        // SAFETY: `count` headers that name one piece of memory, which is only read.
        let sent = check(unsafe {
            libc::sendmmsg(self.socket.as_raw_fd(), messages.as_mut_ptr(), count, 0)
        })?;
        Ok(sent.cast_unsigned() as usize)
    }
}

/// A frame of `len` bytes from nobody to nobody, of a type for experiments.
pub(super) fn frame(len: usize) -> Vec<u8> {
    let mut frame = vec![0; len];
    frame[..14].copy_from_slice(&[2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 0x88, 0xb5]);
    frame
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_taps_line_is_found_and_read() {
        let table = "\
Inter-|   Receive                                                |  Transmit
 face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop fifo colls carrier compressed
    lo:       1       2    0    0    0     0          0         0        3       4    0    0    0     0       0          0
bench0: 45030592  703603    0    5    0     0          0         0       99      88    0    7    0     0       0          0
";
        let expected = Counters {
            written: 703_603,
            read: 88,
            dropped: 7,
        };
        assert_eq!(parse(table), Some(expected));
        assert_eq!(parse("bench01: 1 2 3"), None);
        assert_eq!(parse("bench0: 1 2 3"), None);
    }
}
