//! A vhost-user backend of a few lines whose misbehaviour a test can script.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};

use vmm_sys_util::sock_ctrl_msg::ScmSocket;
use vmm_sys_util::tempfile::TempFile;

pub(super) const GET_FEATURES: u32 = 1;
pub(super) const SET_FEATURES: u32 = 2;
pub(super) const SET_OWNER: u32 = 3;
pub(super) const SET_MEM_TABLE: u32 = 5;
pub(super) const SET_VRING_NUM: u32 = 8;
pub(super) const SET_VRING_BASE: u32 = 10;
pub(super) const GET_VRING_BASE: u32 = 11;
pub(super) const SET_VRING_KICK: u32 = 12;
pub(super) const SET_VRING_ERR: u32 = 14;
pub(super) const GET_PROTOCOL_FEATURES: u32 = 15;
pub(super) const GET_QUEUE_NUM: u32 = 17;
pub(super) const SET_VRING_ENABLE: u32 = 18;
pub(super) const SET_BACKEND_REQ_FD: u32 = 21;
pub(super) const GET_CONFIG: u32 = 24;
pub(super) const GET_INFLIGHT_FD: u32 = 31;
pub(super) const SET_INFLIGHT_FD: u32 = 32;

pub(super) const REPLY_ACK: u64 = 1 << 3;
pub(super) const INFLIGHT_SHMFD: u64 = 1 << 12;
pub(super) const VERSION_1: u64 = 1 << 32;
pub(super) const FLUSH: u64 = 1 << 9;

/// What the backend does at a request.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Fault {
    Refuse,
    Silent,
    HalfAReply,
    WrongReply,
    HangUp,
}

/// What the backend is.
#[derive(Clone)]
pub(super) struct Script {
    pub(super) features: u64,
    pub(super) protocol: u64,
    pub(super) fault: Option<(u32, Fault)>,
    /// Flips a bit of some replies; which ones and which bits follows from the number.
    pub(super) mangle: Option<u64>,
    /// Bytes that it sends at a request, before it answers.
    pub(super) noise: Option<(u32, Vec<u8>)>,
    /// What it says its configuration is.
    pub(super) config: Option<Vec<u8>>,
    /// How large it says that its region for requests in flight is.
    pub(super) region: u64,
}

/// MQ, REPLY_ACK, BACKEND_REQ, CONFIG.
pub(super) const GOOD: Script = Script {
    features: VERSION_1 | FLUSH | 1 << 30,
    protocol: 1 | REPLY_ACK | 1 << 5 | 1 << 9,
    fault: None,
    mangle: None,
    noise: None,
    config: None,
    region: 4096,
};

#[derive(Default)]
pub(super) struct Seen {
    pub(super) requests: Mutex<Vec<(u32, Vec<u8>)>>,
    pub(super) files: Mutex<Vec<(u32, File)>>,
    pub(super) capacity: Mutex<u8>,
    pub(super) current: Mutex<Option<UnixStream>>,
    /// The region that it made last.
    pub(super) region: Mutex<Option<File>>,
}

impl Seen {
    pub(super) fn payload(&self, request: u32) -> Option<Vec<u8>> {
        let requests = self.requests.lock().unwrap();
        let mut found = requests.iter().rev().filter(|(code, _)| *code == request);
        found.next().map(|(_, payload)| payload.clone())
    }

    pub(super) fn file(&self, request: u32) -> File {
        let mut files = self.files.lock().unwrap();
        let at = files
            .iter()
            .rposition(|(code, _)| *code == request)
            .unwrap();
        files.remove(at).1
    }
}

/// Serves one connection after another until it is dropped, which is its death.
pub(super) struct Backend {
    pub(super) seen: Arc<Seen>,
    pub(super) scripts: Arc<Mutex<Vec<Script>>>,
    path: PathBuf,
    thread: Option<JoinHandle<()>>,
}

impl Backend {
    /// The scripts are for one connection each, the last for all that follow; none ends it.
    pub(super) fn listen(path: &Path, scripts: &[Script]) -> Self {
        let seen = Arc::<Seen>::default();
        let mut scripts = scripts.to_vec();
        scripts.reverse();
        let scripts = Arc::new(Mutex::new(scripts));
        let _ = std::fs::remove_file(path);
        let listener = UnixListener::bind(path).unwrap();
        let (shared, left) = (Arc::clone(&seen), Arc::clone(&scripts));
        let thread = thread::spawn(move || {
            for stream in listener.incoming() {
                let script = {
                    let mut left = left.lock().unwrap();
                    match left.len() {
                        0 => return,
                        1 => left[0].clone(),
                        _ => left.pop().unwrap(),
                    }
                };
                let stream = stream.unwrap();
                *shared.current.lock().unwrap() = stream.try_clone().ok();
                serve(stream, &script, &shared);
                *shared.current.lock().unwrap() = None;
            }
        });
        Self {
            seen,
            scripts,
            path: path.to_owned(),
            thread: Some(thread),
        }
    }
}

impl Backend {
    pub(super) fn hang_up(&self) {
        if let Some(stream) = &*self.seen.current.lock().unwrap() {
            let _ = stream.shutdown(std::net::Shutdown::Both);
        }
    }
}

impl Drop for Backend {
    fn drop(&mut self) {
        self.scripts.lock().unwrap().clear();
        let thread = self.thread.take().unwrap();
        while !thread.is_finished() {
            self.hang_up();
            drop(UnixStream::connect(&self.path));
            thread::yield_now();
        }
        let _ = thread.join();
    }
}

/// The next number of a sequence that is the same in each run.
pub(in crate::vhost_user) fn next(random: &mut u64) -> u64 {
    *random ^= *random << 13;
    *random ^= *random >> 7;
    *random ^= *random << 17;
    *random
}

pub(super) fn serve(mut stream: UnixStream, script: &Script, seen: &Seen) {
    let mut mangle = script.mangle;
    let mut header = [0; 12];
    while let Ok((12, file)) = stream.recv_with_fd(&mut header) {
        let word = |i: usize| u32::from_le_bytes(header[4 * i..][..4].try_into().unwrap());
        let (code, need_reply) = (word(0), word(1) & 8 != 0);
        let mut payload = vec![0; word(2) as usize];
        if stream.read_exact(&mut payload).is_err() {
            return;
        }
        seen.requests.lock().unwrap().push((code, payload.clone()));
        if let Some(file) = file {
            seen.files.lock().unwrap().push((code, file));
        }
        if let Some((at, noise)) = &script.noise
            && *at == code
            && stream.write_all(noise).is_err()
        {
            return;
        }
        let mut answer = answer_to(code, need_reply, payload, script, seen);
        let mut reply = Vec::new();
        for word in [code, 5, answer.len() as u32] {
            reply.extend(word.to_le_bytes());
        }
        let silent = match script.fault {
            Some((at, fault)) if at == code => match fault {
                Fault::HangUp => return,
                Fault::Refuse => {
                    answer = 1_u64.to_le_bytes().to_vec();
                    false
                }
                Fault::Silent => true,
                Fault::HalfAReply => stream.write_all(&reply[..7]).is_ok(),
                Fault::WrongReply => {
                    reply[0] ^= 0xff;
                    false
                }
            },
            _ => false,
        };
        if silent {
            // Until the other end gives up.
            while matches!(stream.read(&mut [0; 64]), Ok(1..)) {}
            return;
        }
        if !answer.is_empty() {
            reply.extend(answer);
            if let Some(random) = &mut mangle
                && next(random).is_multiple_of(4)
            {
                let bit = next(random) as usize % (8 * reply.len());
                reply[bit / 8] ^= 1 << (bit % 8);
            }
            if !send(&mut stream, code, &reply, seen) {
                return;
            }
        }
    }
}

/// The payload of a reply; empty where there is none.
fn answer_to(
    code: u32,
    need_reply: bool,
    mut payload: Vec<u8>,
    script: &Script,
    seen: &Seen,
) -> Vec<u8> {
    match code {
        GET_FEATURES => script.features.to_le_bytes().to_vec(),
        GET_PROTOCOL_FEATURES => script.protocol.to_le_bytes().to_vec(),
        GET_QUEUE_NUM => 1_u64.to_le_bytes().to_vec(),
        GET_VRING_BASE => payload,
        GET_INFLIGHT_FD => {
            payload[..8].copy_from_slice(&script.region.to_le_bytes());
            payload
        }
        GET_CONFIG if script.config.is_some() => script.config.clone().unwrap_or_default(),
        GET_CONFIG => {
            payload[12] = *seen.capacity.lock().unwrap();
            payload
        }
        _ if need_reply => vec![0; 8],
        _ => Vec::new(),
    }
}

/// Sends a reply, a region's with a file; whether it went.
fn send(stream: &mut UnixStream, code: u32, reply: &[u8], seen: &Seen) -> bool {
    if code == GET_INFLIGHT_FD {
        let region = TempFile::new().unwrap().into_file();
        region.set_len(4096).unwrap();
        let sent = stream.send_with_fd(reply, region.as_raw_fd()).is_ok();
        *seen.region.lock().unwrap() = Some(region);
        return sent;
    }
    stream.write_all(reply).is_ok()
}
