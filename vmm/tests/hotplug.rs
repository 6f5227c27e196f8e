//! Devices that are added to and removed from a machine on the host's own KVM. The guest polls its first
//! empty slot, and does what a driver of hot-plug does.

mod ring;
#[allow(dead_code, reason = "only the device is needed, not its driver")]
mod stock;
mod support;

use std::path::Path;

use stock::Stock;
use support::slot::{BELOW, BUTTON, CONTROL, PORT, POWER_OFF, PRESENT, STATUS};
use support::{Code, Guest, eventually, has_kvm};
use vhost::vhost_user::message::VhostUserProtocolFeatures as Protocol;

/// Switches on what comes, and off what is to go.
fn driver() -> Code {
    Code::new()
        .pci_wait(PORT, STATUS, PRESENT, PRESENT)
        .pci_write(PORT, STATUS, 0xffff)
        .pci_write(PORT, CONTROL, 0)
        .pci_wait(BELOW, 2, 0xffff, 0x1042)
        .print("added\n")
        .pci_wait(PORT, STATUS, BUTTON, BUTTON)
        .pci_write(PORT, CONTROL, POWER_OFF)
        .pci_wait(PORT, STATUS, PRESENT, 0)
        .pci_wait(BELOW, 2, 0xffff, 0xffff)
        .pci_write(PORT, STATUS, 0xffff)
        .print("removed\n")
        .again()
}

fn listen(path: &Path) -> Stock {
    Stock::listen(path, Protocol::MQ | Protocol::CONFIG)
}

fn lines(guest: &Guest, count: usize) {
    eventually("the guest's lines", || {
        (guest.lines().len() >= count).then_some(())
    });
}

/// With one empty port, which every device goes to.
fn running(code: &Code) -> Guest {
    let guest = Guest::start_with(code, &["--platform", "hotplug_ports=1"]);
    eventually("the guest runs", || {
        (guest.state() == "Running").then_some(())
    });
    guest
}

fn disk(path: &Path, more: &str) -> String {
    let path = path.display();
    format!(r#"{{"vhost_user": true, "vhost_socket": "{path}"{more}}}"#)
}

#[test]
fn a_disk_comes_and_goes_with_the_guests_consent() {
    if !has_kvm() {
        return;
    }
    let guest = running(&driver());
    let socket = guest.path("disk");
    let _stock = listen(&socket);
    // Without the counter that a virtual CPU opens in its own time.
    let files = || {
        let path = format!("/proc/{}/fd", guest.pid());
        let open = std::fs::read_dir(path).unwrap();
        let targets = open.filter_map(|file| std::fs::read_link(file.unwrap().path()).ok());
        targets
            .filter(|target| target != Path::new("anon_inode:[perf_event]"))
            .count()
    };
    let before = files();
    for round in 0..4 {
        let (status, body) = guest.put("vm.add-disk", &disk(&socket, ""));
        let added = r#"{"id":"_disk0","bdf":"0000:01:00.0"}"#;
        assert_eq!((status, body.as_str()), (200, added));
        lines(&guest, 2 * round + 1);
        assert_eq!(guest.counter("_disk0", "backend_connected"), Some(1));
        let (_, info) = guest.api("GET", "vm.info");
        let info: serde_json::Value = serde_json::from_str(&info).unwrap();
        assert_eq!(info["config"]["disks"][0]["id"], "_disk0");
        assert_eq!(info["device_tree"]["_disk0"]["pci_bdf"], "0000:01:00.0");

        assert_eq!(guest.put("vm.remove-device", r#"{"id": "_disk0"}"#).0, 204);
        lines(&guest, 2 * round + 2);
        eventually("the session is forgotten", || {
            guest
                .counter("_disk0", "backend_connected")
                .is_none()
                .then_some(())
        });
    }
    let expected = ["added", "removed"].repeat(4);
    assert_eq!(guest.lines(), expected);
    eventually("no file is left open", || (files() <= before).then_some(()));
}

#[test]
fn what_cannot_be_added_or_removed_changes_nothing() {
    if !has_kvm() {
        return;
    }
    let guest = Guest::start_with(&driver(), &["--platform", "hotplug_ports=1"]);
    eventually("the guest runs", || {
        (guest.state() == "Running").then_some(())
    });
    let socket = guest.path("disk");
    let refused = |name: &str, body: &str, code: u16, part: &str| {
        let (status, text) = guest.put(name, body);
        assert_eq!(status, code, "{body}: {text}");
        assert!(text.contains(part), "{body}: {text}");
    };
    let nobody = disk(&guest.path("nobody"), "");
    refused("vm.add-disk", &nobody, 500, "nobody is at its socket");
    refused("vm.add-disk", "{}", 400, "path= is missing");
    refused("vm.add-disk", r#"{"num_queues": "x"}"#, 400, "DiskConfig: ");
    let odd = disk(&socket, r#", "queue_size": 100"#);
    refused(
        "vm.add-disk",
        &odd,
        400,
        "queue_size=100 must be a power of two",
    );
    let api = disk(&guest.path("api"), "");
    refused("vm.add-disk", &api, 409, "is given twice");
    refused(
        "vm.add-device",
        r#"{"path": "/sys/x"}"#,
        501,
        "not supported",
    );
    refused(
        "vm.remove-device",
        r#"{"id": "_disk0"}"#,
        404,
        "no device _disk0",
    );
    refused(
        "vm.remove-device",
        r#"{"id": "_rng"}"#,
        404,
        "no device _rng",
    );

    let _stock = listen(&socket);
    assert_eq!(
        guest.put("vm.add-disk", &disk(&socket, r#", "id": "a""#)).0,
        200
    );
    let second = guest.path("second");
    let _second = listen(&second);
    let same = disk(&second, r#", "id": "a""#);
    refused("vm.add-disk", &same, 409, "id='a' is used by two devices");
    refused(
        "vm.add-disk",
        &disk(&second, ""),
        500,
        "no root port is free",
    );
    lines(&guest, 1);
    let (_, info) = guest.api("GET", "vm.info");
    let info: serde_json::Value = serde_json::from_str(&info).unwrap();
    assert_eq!(info["config"]["disks"].as_array().unwrap().len(), 1);
}

#[test]
fn a_device_that_the_guest_keeps_can_be_asked_for_again_and_goes_with_the_next_boot() {
    if !has_kvm() {
        return;
    }
    // Neither switches anything on nor off.
    let guest = running(&Code::new().print("boot\n").halt());
    // A reboot before that would take its line away.
    lines(&guest, 1);
    let socket = guest.path("disk");
    let _stock = listen(&socket);
    let body = disk(&socket, r#", "id": "data""#);
    let remove = || guest.put("vm.remove-device", r#"{"id": "data"}"#).0;
    assert_eq!(guest.put("vm.add-disk", &body).0, 200);
    // It has no power, so nobody uses it and nobody is asked.
    assert_eq!(remove(), 204);
    assert_eq!(remove(), 404);
    assert_eq!(guest.put("vm.add-disk", &body).0, 200);
    assert_eq!(guest.api("PUT", "vm.reboot").0, 204);
    // Now it is there from the start, with power.
    lines(&guest, 2);
    assert_eq!(remove(), 204);
    let (status, text) = guest.put("vm.add-disk", &body);
    assert_eq!(status, 409, "{text}");
    assert!(text.contains("has not let go of"), "{text}");
    assert_eq!(remove(), 204, "asked again");
    assert_eq!(guest.api("PUT", "vm.reboot").0, 204);
    assert_eq!(remove(), 404);
    assert_eq!(guest.put("vm.add-disk", &body).0, 200);
}

#[test]
fn without_a_machine_only_the_configuration_changes() {
    if !has_kvm() {
        return;
    }
    let guest = Guest::none(&driver());
    let socket = guest.path("disk");
    let body = disk(&socket, "");
    assert_eq!(guest.put("vm.add-disk", &body).0, 404);
    let config = format!(
        r#"{{"memory": {{"size": 33554432}}, "payload": {{"kernel": "{}"}}}}"#,
        guest.path("kernel").display()
    );
    assert_eq!(guest.put("vm.create", &config).0, 204);
    assert_eq!(guest.put("vm.add-disk", &body), (204, String::new()));
    assert_eq!(
        guest.put("vm.add-disk", &body).0,
        409,
        "its socket is taken"
    );
    let net = disk(&guest.path("net"), r#", "mac": "52:54:00:12:34:56""#);
    assert_eq!(guest.put("vm.add-net", &net).0, 204);
    assert_eq!(guest.put("vm.remove-device", r#"{"id": "_net0"}"#).0, 204);
    let _stock = listen(&socket);
    assert_eq!(guest.api("PUT", "vm.boot").0, 204);
    assert_eq!(guest.counter("_disk0", "backend_connected"), Some(1));
    assert_eq!(guest.counter("_net0", "backend_connected"), None);
}
