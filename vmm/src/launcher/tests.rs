//! Requests that the launcher refuses. What it starts is in `vmm/tests/daemons.rs`.

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
    let policy = Policy::new(Some(&guest()), false);
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
    let policy = Policy::new(Some(&guest()), true);
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
fn a_guest_without_such_devices_needs_no_launcher() {
    let mut config = guest();
    assert!(!Policy::new(Some(&config), false).is_empty());
    config.disks.drain(..2);
    assert!(Policy::new(Some(&config), false).is_empty());
    assert!(!Policy::new(None, true).is_empty());
}
