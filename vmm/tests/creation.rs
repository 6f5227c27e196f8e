//! Guests that are created, booted and deleted through the API of a VMM that was started without one.

#![expect(
    unsafe_code,
    reason = "a descriptor is put in its place between fork and exec"
)]

mod support;

use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;

use support::{Code, Guest, ask, eventually, has_kvm, vmm};
use vmm_sys_util::tempdir::TempDir;

/// A guest whose serial port goes to the file `serial`.
fn config(guest: &Guest) -> String {
    format!(
        r#"{{"cpus": {{"boot_vcpus": 1, "max_vcpus": 1}}, "memory": {{"size": 33554432}},
            "payload": {{"kernel": "{}"}}, "serial": {{"mode": "File", "file": "{}"}}}}"#,
        guest.path("kernel").display(),
        guest.path("serial").display()
    )
}

fn lines(guest: &Guest, count: usize) {
    eventually("the guest's lines", || {
        (guest.lines().len() == count).then_some(())
    });
}

#[test]
fn a_guest_from_nothing_to_nothing() {
    if !has_kvm() {
        return;
    }
    let guest = Guest::none(&Code::new().print("boot\n").halt());
    for (method, name) in [("GET", "vm.info"), ("PUT", "vm.boot"), ("PUT", "vm.pause")] {
        let (status, body) = guest.api(method, name);
        assert_eq!(
            (status, body.as_str()),
            (404, r#"["the VM is not created"]"#),
            "{name}"
        );
    }
    assert_eq!(guest.api("GET", "vmm.ping").0, 200);
    for _ in 0..2 {
        assert_eq!(
            guest.put("vm.create", &config(&guest)),
            (204, String::new())
        );
        assert_eq!(guest.state(), "Created");
        assert_eq!(
            guest.put("vm.create", &config(&guest)).0,
            500,
            "there is one"
        );
        assert_eq!(guest.api("PUT", "vm.pause").0, 500, "it is not booted");
        assert_eq!(guest.api("PUT", "vm.boot").0, 204);
        assert_eq!(guest.state(), "Running", "vm.boot answers when it runs");
        lines(&guest, 1);
        assert_eq!(guest.api("PUT", "vm.reboot").0, 204);
        lines(&guest, 2);
        assert_eq!(guest.api("PUT", "vm.delete").0, 204);
        assert_eq!(guest.api("GET", "vm.info").0, 404);
        assert_eq!(guest.api("PUT", "vm.delete").0, 204, "as wanted");
    }
    assert_eq!(guest.api("PUT", "vmm.shutdown").0, 204);
    let (code, stderr) = guest.wait();
    assert_eq!(code, 0, "{stderr}");
}

#[test]
fn a_configuration_that_makes_no_sense_is_refused_and_forgotten() {
    if !has_kvm() {
        return;
    }
    let guest = Guest::none(&Code::new().halt());
    let good = config(&guest);
    let twice = r#""payload": {"kernel": "/k"}, "disks": [{"id": "a", "vhost_socket": "/x"},
        {"id": "a", "vhost_socket": "/y"}]"#;
    for (body, status, part) in [
        ("nonsense".to_owned(), 400, "VmConfig: expected"),
        ("{}".to_owned(), 400, "payload is missing"),
        (
            good.replace("33554432", "33554433"),
            400,
            "not a multiple of 2 MiB",
        ),
        (
            good.replace(r#""boot_vcpus": 1"#, r#""boot_vcpus": 999"#),
            400,
            "1 to 255",
        ),
        (format!("{{{twice}}}"), 409, "used by two devices"),
        (
            good.replace("/serial", "/nowhere/serial"),
            500,
            "cannot create the serial file",
        ),
    ] {
        let (answered, text) = guest.put("vm.create", &body);
        assert_eq!(answered, status, "{body}: {text}");
        let messages: Vec<String> = serde_json::from_str(&text).unwrap();
        assert!(messages[0].contains(part), "{body}: {text}");
        assert_eq!(messages[0].lines().count(), 1, "{text}");
    }
    assert_eq!(guest.api("GET", "vm.info").0, 404);
    assert_eq!(guest.put("vm.create", &good).0, 204);
}

#[test]
fn a_boot_that_waits_holds_up_nobody_and_is_answered_when_it_is_given_up() {
    if !has_kvm() {
        return;
    }
    let guest = Guest::none(&Code::new().halt());
    let disk = r#""disks": [{"vhost_user": true, "vhost_socket": "/nowhere/disk"}], "serial""#;
    let config = config(&guest).replace(r#""serial""#, disk);
    assert_eq!(guest.put("vm.create", &config).0, 204);
    let stream = UnixStream::connect(guest.path("api")).unwrap();
    let boot = std::thread::spawn(move || ask(stream, "PUT", "vm.boot"));
    // Other clients are answered, and see it wait.
    eventually("the boot", || {
        let (status, text) = guest.api("PUT", "vm.pause");
        assert_eq!(status, 500, "{text}");
        text.contains("Booting").then_some(())
    });
    assert_eq!(guest.state(), "Created");
    assert_eq!(guest.api("PUT", "vm.shutdown").0, 204);
    let (status, text) = boot.join().unwrap();
    assert_eq!(
        (status, text.as_str()),
        (500, r#"["the boot was given up"]"#)
    );
    assert_eq!(guest.state(), "Shutdown");
}

#[test]
fn the_console_of_a_client_is_a_terminal_that_it_finds_in_the_answer() {
    if !has_kvm() {
        return;
    }
    let guest = Guest::none(&Code::new().print("hello\n").halt());
    let file = format!(r#""File", "file": "{}""#, guest.path("serial").display());
    let config = config(&guest).replace(&file, r#""Pty""#);
    assert_eq!(guest.put("vm.create", &config).0, 204);
    let (_, info) = guest.api("GET", "vm.info");
    let info: serde_json::Value = serde_json::from_str(&info).unwrap();
    assert_eq!(info["config"]["serial"]["mode"], "Pty");
    assert_eq!(info["config"]["memory"]["size"], 33554432);
    let pty = info["config"]["serial"]["file"]
        .as_str()
        .unwrap()
        .to_owned();
    let mut pty = std::io::BufReader::new(std::fs::File::open(pty).unwrap());
    assert_eq!(guest.api("PUT", "vm.boot").0, 204);
    let mut line = String::new();
    std::io::BufRead::read_line(&mut pty, &mut line).unwrap();
    assert_eq!(line, "hello\n");
}

#[test]
fn an_api_socket_may_be_inherited() {
    if !has_kvm() {
        return;
    }
    let dir = TempDir::new().unwrap();
    let path = dir.as_path().join("api");
    let listener = UnixListener::bind(&path).unwrap();
    let mut command = vmm();
    let fd = listener.as_raw_fd();
    // SAFETY: dup2 is async-signal-safe, and nothing else happens between fork and exec.
    unsafe {
        command.pre_exec(move || match libc::dup2(fd, 7) {
            7 => Ok(()),
            _ => Err(std::io::Error::last_os_error()),
        });
    }
    let mut child = command.args(["--api-socket", "fd=7"]).spawn().unwrap();
    let ask = |name| ask(UnixStream::connect(&path).unwrap(), "PUT", name);
    // The connection waits in the backlog until the VMM listens.
    assert_eq!(ask("vm.boot").0, 404);
    assert_eq!(ask("vmm.shutdown").0, 204);
    let status = eventually("the end", || child.try_wait().unwrap());
    assert!(status.success());
    assert!(path.exists(), "whoever made it removes it");
}
