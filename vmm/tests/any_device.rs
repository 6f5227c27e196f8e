//! A guest of a few instructions with a vhost-user device of somebody else's code, shown as a device of any type:
//! a request goes from its ring over its doorbell to the backend and back, with the sandbox on.

mod ring;
#[allow(dead_code, reason = "only the device is needed, not its driver")]
mod stock;
mod support;

use std::sync::atomic::Ordering;

use stock::{PATTERN, QUEUES, Stock};
use support::virtio::{Access, BUFFER, CONFIG};
use support::{Code, Guest, eventually, has_kvm};
use vhost::vhost_user::message::VhostUserProtocolFeatures as Protocol;
use vmm_sys_util::tempdir::TempDir;

/// The root port of the only external device, and the device.
const PORT: (u8, u8) = (0, 2);
const DEVICE: (u8, u8) = (1, 0);

/// Has the device fill a buffer by that queue, and says when it has its bytes.
fn filled_by(queue: u16) -> Code {
    Code::new()
        .virtio_submit(PORT, DEVICE, queue, &[(BUFFER, 64, Access::Writes)])
        .virtio_complete()
        .wait32(BUFFER, u32::from_le_bytes([PATTERN; 4]))
        .wait32(BUFFER + 60, u32::from_le_bytes([PATTERN; 4]))
        .print("filled\n")
        .halt()
}

#[test]
fn each_queue_of_a_stock_device_of_any_type_serves_a_guest() {
    if !has_kvm() {
        return;
    }
    let dir = TempDir::new().unwrap();
    for (device_type, queue) in [("rng", 0), ("44", QUEUES as u16 - 1)] {
        let socket = dir.as_path().join(format!("stock-{queue}"));
        let stock = Stock::listen(&socket, Protocol::MQ | Protocol::CONFIG);
        let flag = format!(
            "device_type={device_type},socket={},queue_sizes=[64,64,64,64]",
            socket.display()
        );
        let guest = Guest::start_with(&filled_by(queue), &["--generic-vhost-user", &flag]);
        eventually("the guest's buffer", || {
            (guest.lines() == ["filled"]).then_some(())
        });
        assert_eq!(stock.seen.requests.load(Ordering::SeqCst), 1);
        let connected = guest.counter("_generic_vhost_user0", "backend_connected");
        assert_eq!(connected, Some(1));
        assert_eq!(guest.api("PUT", "vmm.shutdown").0, 204);
        assert_eq!(guest.wait().0, 0);
    }
}

#[test]
fn a_guest_finds_type_and_configuration_of_a_device_that_is_added() {
    if !has_kvm() {
        return;
    }
    // Virtio's device id is 0x1040 and the type; the capacity is what the backend's configuration begins with.
    let code = Code::new()
        .pci_wait(PORT, 0x5a, 1 << 6, 1 << 6)
        .pci_write(PORT, 0x58, 0)
        .pci_wait(DEVICE, 2, 0xffff, 0x1040 + 44)
        .virtio_submit(PORT, DEVICE, 1, &[(BUFFER, 64, Access::Writes)])
        .virtio_complete()
        .wait32(CONFIG, 2048)
        .print("found\n")
        .halt();
    let guest = Guest::start_with(&code, &["--platform", "hotplug_ports=1"]);
    let socket = guest.path("stock");
    let _stock = Stock::listen(&socket, Protocol::MQ | Protocol::CONFIG);
    eventually("the guest runs", || {
        (guest.state() == "Running").then_some(())
    });
    let body = format!(
        r#"{{"device_type": 44, "socket": "{}", "queue_sizes": [64, 64, 64, 64], "id": "it"}}"#,
        socket.display()
    );
    let (status, answer) = guest.put("vm.add-generic-vhost-user", &body);
    assert_eq!(
        (status, answer.as_str()),
        (200, r#"{"id":"it","bdf":"0000:01:00.0"}"#)
    );
    eventually("the guest's line", || {
        (guest.lines() == ["found"]).then_some(())
    });
}
