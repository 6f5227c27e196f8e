//! A balloon from outside: flags, vm.resize, vm.info, counters. The guests here have no driver for it: what a real one
//! does with it is a story of the lab (tests/cases).

#![allow(clippy::unwrap_used, reason = "test code outside of test functions")]

mod support;

use std::path::Path;
use std::process::{Child, Command};

use serde_json::{Value, json};
use support::daemons::{has_daemons, image};
use support::{Code, Guest, has_kvm};

fn info(guest: &Guest) -> Value {
    let (status, body) = guest.api("GET", "vm.info");
    assert_eq!(status, 200, "{body}");
    serde_json::from_str(&body).unwrap()
}

fn balloon(guest: &Guest) -> Option<Value> {
    info(guest).get("balloon").cloned()
}

#[test]
fn its_size_can_be_changed_and_outlives_a_reboot() {
    if !has_kvm() {
        return;
    }
    let args = ["--balloon", "size=1M,free_page_reporting=on"];
    let guest = Guest::start_with(&Code::new().print("boot\n").halt(), &args);
    support::eventually("it runs", || (guest.state() == "Running").then_some(()));
    assert_eq!(
        balloon(&guest),
        Some(json!({"target": 1 << 20, "actual": 0})),
        "nobody has given anything, or said anything"
    );
    let all = info(&guest);
    assert_eq!(all["memory_actual_size"], 32 << 20);
    assert_eq!(all["device_tree"]["_balloon"]["pci_bdf"], "0000:00:02.0");
    assert_eq!(
        all["config"]["balloon"],
        json!({"size": 1 << 20, "deflate_on_oom": false, "free_page_reporting": true})
    );
    // A page and a half is a page.
    let asked = guest.put(
        "vm.resize",
        r#"{"desired_balloon": 6144, "desired_vcpus": null}"#,
    );
    assert_eq!(asked, (204, String::new()));
    assert_eq!(balloon(&guest).unwrap()["target"], 4096);
    assert_eq!(guest.api("PUT", "vm.reboot").0, 204);
    assert_eq!(balloon(&guest).unwrap()["target"], 4096);
    // Nothing to do, and what is there already, are done.
    for same in ["{}", r#"{"desired_vcpus": 1, "desired_ram": 33554432}"#] {
        assert_eq!(guest.put("vm.resize", same).0, 204, "{same}");
    }
    let (_, counters) = guest.api("GET", "vm.counters");
    let counters: Value = serde_json::from_str(&counters).unwrap();
    assert_eq!(counters["_balloon"]["discards"], 0);
    // Without a machine the configuration alone changes.
    assert_eq!(guest.api("PUT", "vm.shutdown").0, 204);
    assert_eq!(
        guest.put("vm.resize", r#"{"desired_balloon": 8192}"#).0,
        204
    );
    assert_eq!(balloon(&guest), None);
    assert_eq!(info(&guest)["config"]["balloon"]["size"], 8192);
}

#[test]
fn what_cannot_be_resized_says_why() {
    if !has_kvm() {
        return;
    }
    let guest = Guest::start_with(&Code::new().halt(), &["--balloon", "size=0"]);
    support::eventually("it runs", || (guest.state() == "Running").then_some(()));
    for (body, code, part) in [
        (
            r#"{"desired_balloon": 33554433}"#,
            400,
            "more than the guest's memory",
        ),
        (r#"{"desired_balloon": -1}"#, 400, "VmResize"),
        (r#"{"desired_vcpus": 2}"#, 501, "desired_vcpus"),
        (r#"{"desired_ram": 67108864}"#, 501, "desired_ram"),
        ("", 400, "VmResize"),
    ] {
        let (status, text) = guest.put("vm.resize", body);
        assert_eq!(status, code, "{body}: {text}");
        assert!(text.contains(part), "{body}: {text}");
    }
    let plain = Guest::start(&Code::new().halt());
    support::eventually("it runs", || (plain.state() == "Running").then_some(()));
    let (status, text) = plain.put("vm.resize", r#"{"desired_balloon": 0}"#);
    assert_eq!(status, 400);
    assert!(text.contains("the guest has no balloon"), "{text}");
    assert_eq!(balloon(&plain), None);
}

/// `berth-blk --fixed-buffers`, which ends with the test.
struct PinningDisk(Child);

impl PinningDisk {
    fn start(dir: &Path) -> Self {
        let _ = image(&dir.join("image"));
        let vmm = Path::new(env!("CARGO_BIN_EXE_berth-vmm"));
        let child = Command::new(vmm.with_file_name("berth-blk"))
            .arg(format!("--socket-path={}", dir.join("disk").display()))
            .arg(format!("--blk-file={}", dir.join("image").display()))
            .arg("--fixed-buffers=guest-never-discards")
            .spawn()
            .unwrap();
        support::eventually("its socket", || dir.join("disk").exists().then_some(()));
        Self(child)
    }
}

impl Drop for PinningDisk {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_disk_that_pins_guest_memory_is_not_taken_beside_it() {
    if !has_daemons() {
        return;
    }
    for (args, code) in [(&["--balloon", "size=0"][..], 500), (&[], 200)] {
        let guest = Guest::start_with(&Code::new().halt(), args);
        support::eventually("it runs", || (guest.state() == "Running").then_some(()));
        let socket = guest.path("disk");
        let _disk = PinningDisk::start(socket.parent().unwrap());
        let added = format!(
            r#"{{"vhost_user": true, "vhost_socket": "{}"}}"#,
            socket.display()
        );
        let (status, text) = guest.put("vm.add-disk", &added);
        assert_eq!(status, code, "{args:?}: {text}");
        assert_eq!(guest.api("PUT", "vmm.shutdown").0, 204);
        let (_, stderr) = guest.wait();
        let says = stderr.contains("pinned (berth-blk --fixed-buffers)");
        assert_eq!(says, code == 500, "{stderr}");
    }
}
