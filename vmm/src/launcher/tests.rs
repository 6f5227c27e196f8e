//! Requests that the launcher refuses. What it starts is in `vmm/tests/daemons.rs`.

use std::os::unix::net::UnixStream;
use std::time::Duration;

use vmm_sys_util::tempdir::TempDir;

use super::*;
use crate::config::{VmConfig, device_flags, testing};

fn guest() -> VmConfig {
    VmConfig {
        disks: vec![
            device_flags::disk("path=/a.raw", 0).unwrap(),
            device_flags::disk("path=/b.raw,backend=/opt/daemon", 1).unwrap(),
            device_flags::disk("socket=/s", 2).unwrap(),
        ],
        ..testing::config()
    }
}

fn request(text: &str) -> Request {
    Request::of(&Kind::Blk(device_flags::disk(text, 7).unwrap())).unwrap()
}

#[test]
fn without_an_api_nothing_is_started_but_what_the_command_line_names() {
    let policy = Policy::new(Some(&guest()), false, &[]);
    policy.check(&request("path=/a.raw")).unwrap();
    policy
        .check(&request("path=/b.raw,backend=/opt/daemon"))
        .unwrap();
    for other in [
        "path=/etc/shadow",
        "path=/a.raw,direct=on",
        "path=/b.raw",
        "path=/a.raw,backend=/opt/daemon",
    ] {
        assert!(policy.check(&request(other)).is_err(), "{other}");
    }
}

#[test]
fn with_an_api_disks_may_come_and_programs_may_not() {
    let policy = Policy::new(Some(&guest()), true, &[]);
    policy.check(&request("path=/c.raw")).unwrap();
    policy
        .check(&request("path=/c.raw,backend=/opt/daemon"))
        .unwrap();
    let error = policy
        .check(&request("path=/c.raw,backend=/bin/sh"))
        .unwrap_err();
    assert_eq!(error, "/bin/sh was not named on the command line");
}

#[test]
fn images_that_come_by_the_api_are_among_the_files_that_it_may_name() {
    let dir = TempDir::new().unwrap();
    let at = |name: &str| dir.as_path().join(name).display().to_string();
    for name in ["out", "in/rw", "in/ro"] {
        let path = dir.as_path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, "image").unwrap();
    }
    std::os::unix::fs::symlink(at("out"), at("in/link")).unwrap();
    let rules = [("in/ro", "r"), ("in", "rw")].map(|(name, access)| {
        FileRule::parse(&format!("path={},access={access}", at(name))).unwrap()
    });
    let check = |rules: &[FileRule], name: &str, more: &str| {
        let policy = Policy::new(Some(&guest()), true, rules);
        policy.check(&request(&format!("path={}{more}", at(name))))
    };
    check(&rules, "in/rw", "").unwrap();
    check(&rules[..1], "in/ro", ",readonly=on").unwrap();
    for (rules, name) in [
        (&rules[..1], "in/ro"),
        (&rules[..], "out"),
        (&rules[..], "in/link"),
        (&rules[..], "in/../out"),
    ] {
        let error = check(rules, name, "").unwrap_err();
        assert_eq!(error, format!("no --landlock-rules allows {}", at(name)));
    }
    assert!(check(&rules, "in/nothing", "").is_err());
    let policy = Policy::new(Some(&guest()), true, &rules);
    policy.check(&request("path=/a.raw")).unwrap();
}

#[test]
fn a_guest_without_such_devices_needs_no_launcher() {
    let mut config = guest();
    assert!(!Policy::new(Some(&config), false, &[]).is_empty());
    config.disks.drain(..2);
    assert!(Policy::new(Some(&config), false, &[]).is_empty());
    assert!(!Policy::new(None, true, &[]).is_empty());
}

/// Sends a request as the VMM does, with that end of a lease, and has it taken.
fn ask(request: &Request, held: &UnixDatagram) {
    let (channel, theirs) = sys::seqpacket_pair().unwrap();
    let (stream, _daemon) = UnixStream::pair().unwrap();
    let fds = [stream.as_raw_fd(), stream.as_raw_fd(), held.as_raw_fd()];
    let message = serde_json::to_vec(request).unwrap();
    channel.send_with_fds(&[&message[..]], &fds).unwrap();
    let policy = Policy::new(Some(&guest()), false, &[]);
    assert!(process::receive(&theirs, &policy, &mut Vec::new()).unwrap());
}

#[test]
fn whoever_does_not_read_what_is_said_on_a_lease_holds_up_nobody() {
    let refused = request("path=/etc/shadow");
    let (lease, held) = sys::seqpacket_pair().unwrap();
    ask(&refused, &held);
    let mut report = [0; 256];
    let len = lease.recv(&mut report).unwrap();
    let report: Report = serde_json::from_slice(&report[..len]).unwrap();
    let reason = "the command line has no such device".to_owned();
    assert_eq!(report, Report::Failed(reason));

    held.set_nonblocking(true).unwrap();
    while held.send(b"full").is_ok() {}
    held.set_nonblocking(false).unwrap();
    let (done, is_done) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        ask(&refused, &held);
        done.send(()).unwrap();
    });
    is_done.recv_timeout(Duration::from_secs(60)).unwrap();
}
