//! Whether the tap is up, followed by netlink: what the guest sees as its cable. And its MTU.
//!
//! The sockets are opened with the tap, before the sandbox closes. A thread of its own, `net-link`,
//! blocks on one and calls back with the state at its start and on every message about the
//! interface. It ends with the process. Links of other interfaces come by too and are skipped.
//!
//! Kernel: `man 7 rtnetlink`, RTM_NEWLINK and RTM_DELLINK.

#![forbid(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixDatagram;
use std::thread;

use berth_queue_worker::sandbox::{self, ThreadKind};

use super::sys;

/// A netlink message header: length, type, flags, sequence, port.
const NLMSG_HDR: usize = 16;
/// An ifinfomsg: family, type, index, flags, change.
const IFINFO: usize = 16;

/// Attribute of a link: its MTU.
const IFLA_MTU: u16 = 4;

/// State of an interface.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Link {
    /// Whether it is set up.
    pub up: bool,
    /// Its MTU, if the message says.
    pub mtu: Option<u32>,
}

/// An interface whose state can be asked for and followed.
#[derive(Debug)]
pub struct LinkWatch {
    name: String,
    if_index: u32,
    /// A netlink socket is a datagram socket, and receiving is all that is asked of it.
    messages: UnixDatagram,
    /// To ask on.
    socket: OwnedFd,
}

impl LinkWatch {
    /// Opens what is needed to follow the interface `name`. Changes are heard of from now on.
    ///
    /// # Errors
    /// There is no such interface, or no netlink.
    pub fn open(name: &str) -> io::Result<LinkWatch> {
        Ok(LinkWatch {
            name: name.to_owned(),
            if_index: sys::if_index(name).ok_or(io::ErrorKind::NotFound)?,
            messages: UnixDatagram::from(sys::link_socket()?),
            socket: sys::control_socket()?,
        })
    }

    /// The interface's MTU.
    ///
    /// # Errors
    /// It has gone.
    pub fn mtu(&self) -> io::Result<u32> {
        let mtu = sys::mtu(self.socket.as_fd(), &self.name)?;
        u32::try_from(mtu).map_err(|_| io::ErrorKind::InvalidData.into())
    }

    /// Starts the thread: `on_change` is told how the interface is, first as it is now.
    ///
    /// # Errors
    /// No descriptor, or no thread.
    pub fn follow(&self, on_change: impl Fn(Link) + Send + 'static) -> io::Result<()> {
        let link = LinkWatch {
            name: self.name.clone(),
            if_index: self.if_index,
            messages: self.messages.try_clone()?,
            socket: self.socket.try_clone()?,
        };
        thread::Builder::new()
            .name("net-link".to_string())
            .spawn(move || match sandbox::enter_thread(ThreadKind::Helper) {
                Ok(()) => link.run(on_change),
                Err(error) => {
                    tracing::error!(%error, "no sandbox for this thread: the link is not followed");
                }
            })
            .map(drop)
    }

    fn run(&self, on_change: impl Fn(Link)) {
        // Up where that cannot be found out.
        on_change(Link {
            up: sys::is_up(self.socket.as_fd(), &self.name).unwrap_or(true),
            mtu: self.mtu().ok(),
        });
        let mut buffer = vec![0; 32 << 10];
        loop {
            match self.messages.recv(&mut buffer) {
                Ok(len) => {
                    if let Some(link) = last_state(&buffer[..len], self.if_index) {
                        on_change(link);
                    }
                }
                // Messages were lost: the next one says how things are.
                Err(e) if e.raw_os_error() == Some(libc::ENOBUFS) => {}
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    tracing::warn!(%error, "the tap's link is not followed any more");
                    return;
                }
            }
        }
    }
}

/// State of the interface after these messages; none if they are about others.
fn last_state(mut messages: &[u8], if_index: u32) -> Option<Link> {
    let mut state = None;
    while let Some(len) = u32_at(messages, 0) {
        let len = len as usize;
        let Some(message) = messages.get(..len).filter(|m| m.len() >= NLMSG_HDR) else {
            break;
        };
        state = state_in(message, if_index).or(state);
        // Messages begin at multiples of four.
        messages = messages.get(len.next_multiple_of(4)..).unwrap_or_default();
    }
    state
}

fn state_in(message: &[u8], if_index: u32) -> Option<Link> {
    let kind = u16::from_ne_bytes(message.get(4..6)?.try_into().ok()?);
    let info = message.get(NLMSG_HDR..NLMSG_HDR + IFINFO)?;
    if u32_at(info, 4)? != if_index {
        return None;
    }
    match kind {
        libc::RTM_NEWLINK => Some(Link {
            up: u32_at(info, 8)? & libc::IFF_UP as u32 != 0,
            mtu: mtu_in(&message[NLMSG_HDR + IFINFO..]),
        }),
        libc::RTM_DELLINK => Some(Link {
            up: false,
            mtu: None,
        }),
        _ => None,
    }
}

/// The MTU among these attributes: each is length, type, and value, from multiples of four on.
fn mtu_in(mut attributes: &[u8]) -> Option<u32> {
    while let Some(head) = attributes.first_chunk::<4>() {
        let len = usize::from(u16::from_ne_bytes([head[0], head[1]]));
        let attribute = attributes.get(..len).filter(|a| a.len() >= 4)?;
        if u16::from_ne_bytes([head[2], head[3]]) == IFLA_MTU {
            return u32_at(attribute, 4);
        }
        attributes = attributes.get(len.next_multiple_of(4)..)?;
    }
    None
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(kind: u16, index: u32, flags: u32, attributes: usize) -> Vec<u8> {
        let len = NLMSG_HDR + IFINFO + attributes;
        let mut bytes = (len as u32).to_ne_bytes().to_vec();
        bytes.extend(kind.to_ne_bytes());
        bytes.extend([0; 10]);
        bytes.extend([0; 4]);
        bytes.extend(index.to_ne_bytes());
        bytes.extend(flags.to_ne_bytes());
        bytes.extend([0; 4]);
        bytes.resize(len.next_multiple_of(4), 0);
        bytes
    }

    #[test]
    fn the_last_message_about_the_interface_counts() {
        let messages = [
            message(libc::RTM_NEWLINK, 7, 1, 5),
            message(libc::RTM_NEWLINK, 7, 0, 8),
            message(libc::RTM_NEWLINK, 8, 1, 0),
            message(libc::RTM_NEWADDR, 7, 1, 0),
        ]
        .concat();
        let up = |up| Some(Link { up, mtu: None });
        assert_eq!(last_state(&messages, 7), up(false));
        assert_eq!(last_state(&messages, 8), up(true));
        assert_eq!(last_state(&messages, 9), None);
        assert_eq!(
            last_state(&message(libc::RTM_DELLINK, 7, 1, 0), 7),
            up(false)
        );
    }

    #[test]
    fn the_mtu_is_one_of_the_attributes() {
        // A name of five bytes, padded; the MTU; something else
        let name = [9, 0, 3, 0, b't', b'a', b'p', b'0', 0, 0, 0, 0];
        let mtu = [&[8, 0, 4, 0][..], &9000_u32.to_ne_bytes()].concat();
        let other = [8, 0, 13, 0, 1, 0, 0, 0];
        let all = [&name[..], &mtu, &other].concat();
        assert_eq!(mtu_in(&all), Some(9000));
        assert_eq!(mtu_in(&[&name[..], &other].concat()), None);
        for cut in 0..19 {
            assert_eq!(mtu_in(&all[..cut]), None, "{cut}");
        }
        assert_eq!(mtu_in(&[0; 64]), None);
    }

    #[test]
    fn broken_messages_end_the_walk() {
        let mut zero_length = message(libc::RTM_NEWLINK, 7, 1, 0);
        zero_length[..4].fill(0);
        assert_eq!(last_state(&zero_length, 7), None);
        let whole = message(libc::RTM_NEWLINK, 7, 1, 0);
        for cut in 0..whole.len() {
            assert_eq!(last_state(&whole[..cut], 7), None);
        }
        assert_eq!(last_state(&[0xff; 64], 7), None);
    }
}
