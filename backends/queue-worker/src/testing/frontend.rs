//! The frontend's side of the control channel.

use std::io::{ErrorKind, Read};
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use super::TIMEOUT;
use super::driver::DriverQueue;
use super::ram::GuestRam;
use crate::features;
use crate::guest_memory::RegionInfo;
use crate::protocol::connection::{receive_with_fds, send_with_fds};
use crate::protocol::message::{self, FrontendReq, HEADER_SIZE, InflightInfo};

/// A vhost-user frontend that sends what a test wants.
#[derive(Debug)]
pub struct FakeFrontend {
    stream: UnixStream,
    /// What came with replies and nobody has taken.
    fds: Vec<OwnedFd>,
}

/// An in-flight region, as a frontend keeps it while backends come and go.
#[derive(Debug)]
pub struct Inflight {
    /// The memory.
    pub file: OwnedFd,
    /// Where in it the region is.
    pub info: InflightInfo,
}

fn bytes_of(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|w| w.to_ne_bytes()).collect()
}

/// A payload of two 32-bit numbers: index and value.
fn vring_state(index: u16, value: u32) -> [u8; 8] {
    let mut bytes = [0; 8];
    bytes[..4].copy_from_slice(&u32::from(index).to_ne_bytes());
    bytes[4..].copy_from_slice(&value.to_ne_bytes());
    bytes
}

fn region_words(info: &RegionInfo) -> [u64; 4] {
    [info.gpa, info.size, info.uva, info.file_offset]
}

impl FakeFrontend {
    /// Speaks on a connected socket.
    pub fn new(stream: UnixStream) -> FakeFrontend {
        stream.set_read_timeout(Some(TIMEOUT)).unwrap();
        stream.set_write_timeout(Some(TIMEOUT)).unwrap();
        let fds = Vec::new();
        FakeFrontend { stream, fds }
    }

    /// Sends bytes as they are.
    pub fn send_raw(&mut self, bytes: &[u8], fds: &[BorrowedFd]) {
        // The other side may have closed already: the test sees that when it reads.
        let _ = send_with_fds(self.stream.as_fd(), bytes, fds);
    }

    /// Sends a request that wants no acknowledgement.
    pub fn send(&mut self, request: FrontendReq, payload: &[u8], fds: &[BorrowedFd]) {
        let bytes = message::frontend_request(request.into(), false, payload);
        self.send_raw(&bytes, fds);
    }

    /// Sends a request and returns the payload of its reply.
    pub fn ask(&mut self, request: FrontendReq, payload: &[u8]) -> Vec<u8> {
        self.send(request, payload, &[]);
        self.read_reply(request)
    }

    /// Sends a request with NEED_REPLY; the acknowledgement, 0 for success.
    pub fn try_request(&mut self, request: FrontendReq, payload: &[u8], fds: &[BorrowedFd]) -> u64 {
        let bytes = message::frontend_request(request.into(), true, payload);
        self.send_raw(&bytes, fds);
        let reply = self.read_reply(request);
        u64::from_ne_bytes(reply.try_into().expect("acknowledgement of 8 bytes"))
    }

    /// Sends a request with NEED_REPLY that must succeed.
    pub fn request(&mut self, request: FrontendReq, payload: &[u8], fds: &[BorrowedFd]) {
        let ack = self.try_request(request, payload, fds);
        assert_eq!(ack, 0, "{request:?} was refused");
    }

    /// Reads the reply of one number to a request that was sent already.
    pub fn number_reply(&mut self, request: FrontendReq) -> u64 {
        let reply = self.read_reply(request);
        u64::from_ne_bytes(reply.try_into().expect("reply of 8 bytes"))
    }

    /// Reads the payload of the reply to a request that was sent already.
    pub fn read_reply(&mut self, request: FrontendReq) -> Vec<u8> {
        let mut header = [0; HEADER_SIZE];
        let mut have = 0;
        while have < HEADER_SIZE {
            match receive_with_fds(self.stream.as_fd(), &mut header[have..], &mut self.fds) {
                Ok(0) => panic!("no reply to {request:?}: the backend closed the connection"),
                Ok(got) => have += got,
                Err(e) => panic!("no reply to {request:?}: {e}"),
            }
        }
        let word = |at: usize| u32::from_ne_bytes(header[at..at + 4].try_into().unwrap());
        assert_eq!(word(0), u32::from(request), "reply to another request");
        assert!(message::is_reply(word(4)), "flags {:#x}", word(4));
        let mut payload = vec![0; word(8) as usize];
        self.stream.read_exact(&mut payload).unwrap();
        payload
    }

    /// Whether the backend has closed the connection (waits for it).
    pub fn is_closed(&mut self) -> bool {
        match self.stream.read(&mut [0; 1]) {
            Ok(0) => true,
            Ok(_) => panic!("the backend said something"),
            Err(e) => e.kind() == ErrorKind::ConnectionReset,
        }
    }

    /// Whether the backend has closed the connection, rather than answer `request`, whose reply
    /// is one number and which was sent already.
    pub fn is_closed_or_number(&mut self, request: FrontendReq) -> bool {
        let mut reply = [0; HEADER_SIZE + 8];
        match self.stream.read_exact(&mut reply) {
            Ok(()) => {
                assert_eq!(reply[..4], u32::from(request).to_ne_bytes());
                false
            }
            Err(e) => {
                let ended = [ErrorKind::UnexpectedEof, ErrorKind::ConnectionReset];
                assert!(ended.contains(&e.kind()), "no answer to {request:?}: {e}");
                true
            }
        }
    }

    /// Ends the connection.
    pub fn disconnect(&mut self) {
        let _ = self.stream.shutdown(Shutdown::Both);
    }

    /// A request whose reply is one number.
    pub fn number(&mut self, request: FrontendReq) -> u64 {
        let reply = self.ask(request, &[]);
        u64::from_ne_bytes(reply.try_into().expect("reply of 8 bytes"))
    }

    /// SET_OWNER, features and protocol features; `wanted` of what is offered. Returns them.
    pub fn negotiate(&mut self, wanted: u64) -> u64 {
        self.send(FrontendReq::SET_OWNER, &[], &[]);
        // The switch of the dirty log is not the driver's: a test turns it on by itself.
        let wanted = wanted & !(1 << features::LOG_ALL);
        let bits = self.number(FrontendReq::GET_FEATURES) & wanted;
        if bits & 1 << features::PROTOCOL_FEATURES != 0 {
            let protocol = self.number(FrontendReq::GET_PROTOCOL_FEATURES);
            self.send(
                FrontendReq::SET_PROTOCOL_FEATURES,
                &protocol.to_ne_bytes(),
                &[],
            );
        }
        self.send(FrontendReq::SET_FEATURES, &bits.to_ne_bytes(), &[]);
        bits
    }

    /// SET_MEM_TABLE with these regions.
    pub fn set_mem_table(&mut self, rams: &[&GuestRam]) {
        let mut payload = bytes_of(&[rams.len() as u64]);
        for ram in rams {
            payload.extend(bytes_of(&region_words(&ram.info())));
        }
        let fds: Vec<_> = rams.iter().map(|ram| ram.fd()).collect();
        self.request(FrontendReq::SET_MEM_TABLE, &payload, &fds);
    }

    /// ADD_MEM_REG; the acknowledgement.
    pub fn add_mem_reg(&mut self, info: &RegionInfo, fd: BorrowedFd) -> u64 {
        let mut payload = bytes_of(&[0]);
        payload.extend(bytes_of(&region_words(info)));
        self.try_request(FrontendReq::ADD_MEM_REG, &payload, &[fd])
    }

    /// REM_MEM_REG; the acknowledgement.
    pub fn rem_mem_reg(&mut self, info: &RegionInfo) -> u64 {
        let mut payload = bytes_of(&[0]);
        payload.extend(bytes_of(&region_words(info)));
        self.try_request(FrontendReq::REM_MEM_REG, &payload, &[])
    }

    /// GET_INFLIGHT_FD: a new region.
    pub fn get_inflight(&mut self, num_queues: u16, queue_size: u16) -> Inflight {
        let asked = InflightInfo {
            num_queues,
            queue_size,
            ..InflightInfo::default()
        };
        let reply = self.ask(FrontendReq::GET_INFLIGHT_FD, &asked.to_bytes());
        Inflight {
            file: self.fds.pop().expect("an fd with the region"),
            info: InflightInfo::parse(&reply).expect("the shape of the region"),
        }
    }

    /// SET_INFLIGHT_FD; the acknowledgement.
    pub fn set_inflight(&mut self, region: &Inflight) -> u64 {
        let payload = region.info.to_bytes();
        let fds = [region.file.as_fd()];
        self.try_request(FrontendReq::SET_INFLIGHT_FD, &payload, &fds)
    }

    /// Sets a queue up from `base`, with its fds, and enables it.
    pub fn start_queue(&mut self, queue: &DriverQueue, base: u16, features: u64) {
        let index = queue.index();
        let size = u32::from(queue.size());
        self.request(FrontendReq::SET_VRING_NUM, &vring_state(index, size), &[]);
        let base = u32::from(base);
        self.request(FrontendReq::SET_VRING_BASE, &vring_state(index, base), &[]);
        self.set_vring_addr(queue);
        let fd_payload = u64::from(index).to_ne_bytes();
        self.request(FrontendReq::SET_VRING_CALL, &fd_payload, &[queue.call_fd()]);
        self.request(FrontendReq::SET_VRING_ERR, &fd_payload, &[queue.err_fd()]);
        self.request(FrontendReq::SET_VRING_KICK, &fd_payload, &[queue.kick_fd()]);
        if features & 1 << features::PROTOCOL_FEATURES != 0 {
            self.set_enable(index, true);
        }
    }

    /// SET_VRING_ADDR.
    pub fn set_vring_addr(&mut self, queue: &DriverQueue) {
        self.set_vring_addr_logged(queue, false);
    }

    /// SET_VRING_ADDR, with VHOST_VRING_F_LOG for the used ring or without.
    pub fn set_vring_addr_logged(&mut self, queue: &DriverQueue, logged: bool) {
        let [desc, avail, used] = queue.uvas();
        let index = u64::from(queue.index()) | u64::from(logged) << 32;
        let payload = bytes_of(&[index, desc, used, avail, queue.gpas()[2]]);
        self.request(FrontendReq::SET_VRING_ADDR, &payload, &[]);
    }

    /// SET_LOG_BASE; what it answers, 0 for success.
    pub fn set_log_base(&mut self, size: u64, offset: u64, fd: BorrowedFd) -> u64 {
        let payload = bytes_of(&[size, offset]);
        self.try_request(FrontendReq::SET_LOG_BASE, &payload, &[fd])
    }

    /// SET_FEATURES.
    pub fn set_features(&mut self, bits: u64) {
        self.request(FrontendReq::SET_FEATURES, &bits.to_ne_bytes(), &[]);
    }

    /// SET_VRING_ENABLE.
    pub fn set_enable(&mut self, index: u16, enable: bool) {
        let payload = vring_state(index, u32::from(enable));
        self.request(FrontendReq::SET_VRING_ENABLE, &payload, &[]);
    }

    /// GET_VRING_BASE: stops the queue; the index it would go on from.
    pub fn stop_queue(&mut self, index: u16) -> u16 {
        let reply = self.ask(FrontendReq::GET_VRING_BASE, &vring_state(index, 0));
        u32::from_ne_bytes(reply[4..8].try_into().unwrap()) as u16
    }

    /// GET_CONFIG: `size` bytes from `offset`; empty where the backend refused.
    pub fn get_config(&mut self, offset: u32, size: u32) -> Vec<u8> {
        let mut payload = vring_state(0, size).to_vec();
        payload[..4].copy_from_slice(&offset.to_ne_bytes());
        payload.extend([0; 4]);
        payload.extend(vec![0; size as usize]);
        self.ask(FrontendReq::GET_CONFIG, &payload).split_off(12)
    }

    /// SET_CONFIG; the acknowledgement.
    pub fn set_config(&mut self, offset: u32, data: &[u8]) -> u64 {
        let mut payload = vring_state(0, data.len() as u32).to_vec();
        payload[..4].copy_from_slice(&offset.to_ne_bytes());
        payload.extend([0; 4]);
        payload.extend(data);
        self.try_request(FrontendReq::SET_CONFIG, &payload, &[])
    }
}
