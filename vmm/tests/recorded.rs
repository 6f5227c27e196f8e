//! What known clients send, replayed against a VMM with a guest of two instructions: every request gets the
//! code that the client waits for, and what it reads back.

#![expect(
    unsafe_code,
    reason = "a tap is made by an ioctl, in a network of its own"
)]
#![allow(clippy::unwrap_used, reason = "test code outside of test functions")]

mod support;

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::thread;

use serde_json::Value;
use support::daemons::has_daemons;
use support::{Code, Guest, PATIENCE, eventually};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
/// A tap, without a header of its own, with virtio's.
const TAP_FLAGS: u16 = 0x0002 | 0x1000 | 0x4000;

/// A tap in a network that goes with its last descriptor; an error where this user may not make one.
fn tap() -> io::Result<File> {
    let made = thread::spawn(|| {
        // SAFETY: it concerns this thread alone, which ends with the tap made.
        if unsafe { libc::unshare(libc::CLONE_NEWNET) } < 0 {
            return Err(io::Error::last_os_error());
        }
        let file = File::options()
            .read(true)
            .write(true)
            .open("/dev/net/tun")?;
        let mut request = [0_u8; 40];
        request[..4].copy_from_slice(b"rec0");
        request[16..18].copy_from_slice(&TAP_FLAGS.to_ne_bytes());
        // SAFETY: the request is a struct ifreq, 40 bytes, which outlives the call.
        match unsafe { libc::ioctl(file.as_raw_fd(), TUNSETIFF, request.as_mut_ptr()) } {
            0 => Ok(file),
            _ => Err(io::Error::last_os_error()),
        }
    });
    made.join().unwrap()
}

/// One request: status and body.
fn send(guest: &Guest, request: &str, body: &str, taps: &[File]) -> (u16, String) {
    let (method, name) = request.split_once(' ').unwrap();
    let path = guest.path("api");
    let mut stream = eventually("the API listens", || UnixStream::connect(&path).ok());
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let text = format!(
        "{method} /api/v1/{name} HTTP/1.1\r\nHost: localhost\r\nAccept: application/json\r\n\
         Content-Type: application/json\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    );
    let fds: Vec<_> = taps.iter().map(AsRawFd::as_raw_fd).collect();
    let sent = stream.send_with_fds(&[text.as_bytes()], &fds).unwrap();
    assert_eq!(sent, text.len());
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let status = answer.get(9..12).and_then(|code| code.parse().ok());
    let (_, body) = answer.split_once("\r\n\r\n").unwrap_or_default();
    (status.unwrap_or(0), body.to_owned())
}

/// Whether `answer` holds what is wanted: fields of objects, all items of lists, `*` for any text.
fn holds(answer: &Value, wanted: &Value) -> bool {
    match (answer, wanted) {
        (Value::String(_), Value::String(any)) if any == "*" => true,
        (Value::Object(answer), Value::Object(wanted)) => wanted
            .iter()
            .all(|(name, wanted)| answer.get(name).is_some_and(|answer| holds(answer, wanted))),
        (Value::Array(answer), Value::Array(wanted)) => {
            answer.len() == wanted.len() && answer.iter().zip(wanted).all(|(a, w)| holds(a, w))
        }
        _ => answer == wanted,
    }
}

/// The text with the paths of the test.
fn place(text: &str, guest: &Guest) -> String {
    let path = |name: &str| guest.path(name).display().to_string();
    text.replace("$KERNEL", &path("kernel"))
        .replace("$DISK", &path("disk.img"))
        .replace("$SPARE", &path("spare.img"))
        .replace("$DIR", path("").trim_end_matches('/'))
}

fn replay(recorded: &str) {
    if !has_daemons() {
        return;
    }
    let guest = Guest::none(&Code::new().halt());
    for image in ["disk.img", "spare.img"] {
        let file = File::create(guest.path(image)).unwrap();
        file.set_len(16 << 20).unwrap();
    }
    let recorded: Value = serde_json::from_str(&place(recorded, &guest)).unwrap();
    for exchange in recorded["exchanges"].as_array().unwrap() {
        let request = exchange["request"].as_str().unwrap();
        let count = exchange["taps"].as_u64().unwrap_or(0);
        let taps: io::Result<Vec<_>> = (0..count).map(|_| tap()).collect();
        let taps = match taps {
            Ok(taps) => taps,
            Err(error) => {
                eprintln!("skipped: {request}: no tap: {error}");
                continue;
            }
        };
        let body = exchange.get("body").map(Value::to_string);
        let (status, answer) = send(&guest, request, &body.unwrap_or_default(), &taps);
        let client = &recorded["client"];
        assert_eq!(status, exchange["status"], "{client}: {request}: {answer}");
        if let Some(wanted) = exchange.get("answer") {
            let answer = serde_json::from_str(&answer).unwrap();
            assert!(
                holds(&answer, wanted),
                "{client}: {request}: {answer:#} does not hold {wanted:#}"
            );
        } else {
            assert_eq!(answer, "", "{client}: {request}");
        }
    }
    let (code, stderr) = guest.wait();
    assert_eq!(code, 0, "{stderr}");
}

#[test]
fn libvirt_drives_it() {
    replay(include_str!("recorded/libvirt.json"));
}

#[test]
fn kata_in_go_drives_it() {
    replay(include_str!("recorded/kata-go.json"));
}

#[test]
fn kata_in_rust_drives_it() {
    replay(include_str!("recorded/kata-rust.json"));
}

#[test]
fn ch_remote_drives_it() {
    replay(include_str!("recorded/ch-remote.json"));
}
