//! What a person meets: capabilities, help, and errors that say what is wrong in one line.
#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

mod support;

use support::{
    Daemon, SocketPath, attach, describe, fails, fails_with_stdin, in_namespace, ip, run,
};

fn stdout(args: &[&str]) -> String {
    let output = run(args);
    assert!(output.status.success());
    String::from_utf8(output.stdout).unwrap()
}

/// The error of a tap that cannot be used.
fn tap_error(args: &[&str]) -> String {
    let socket = SocketPath::new();
    let socket = format!("--socket-path={}", socket.display());
    fails(1, &[&[&*socket], args].concat())
}

#[test]
fn capabilities_are_json() {
    assert_eq!(
        stdout(&["--print-capabilities"]).trim(),
        r#"{"type":"net"}"#
    );
}

#[test]
fn help_has_examples_and_version_a_number() {
    let help = stdout(&["--help"]);
    for text in ["Examples:", "--tap-fd", "--socket-path", "--metrics-socket"] {
        assert!(help.contains(text), "{text} in {help}");
    }
    assert!(stdout(&["--version"]).starts_with("berth-net 0."));
}

#[test]
fn wrong_usage_ends_with_two() {
    assert!(fails(2, &["--socket-path=s"]).contains("--tap=NAME or --tap-fd=N"));
    assert!(fails(2, &["--socket-path=s", "--tap=a", "--queue-size=3"]).contains("power of two"));
    let output = run(&["--tap=a", "--nmu-queues=3"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(
        String::from_utf8(output.stderr)
            .unwrap()
            .contains("--num-queues")
    );
}

#[test]
fn taps_that_cannot_be_used() {
    in_namespace(|| {
        // Arrange
        ip("tuntap add single mode tap");
        ip("tuntap add busy mode tap");
        ip("tuntap add tun mode tun");
        ip("link add veth type veth peer name peer");
        let _holder = Daemon::start(&["--tap=busy"]);
        let error = |args: &[&str], text: &str| {
            let line = tap_error(args);
            assert!(line.contains(text), "{line}");
        };
        // Act, assert
        error(&["--tap=none"], "tap 'none' does not exist");
        error(&["--tap=busy"], "tap 'busy' is in use");
        error(&["--tap=busy", "--create"], "tap 'busy' is in use");
        error(&["--tap=tun"], "'tun' is not a tap");
        error(&["--tap=veth"], "'veth' is not a tap");
        error(&["--tap=veth", "--num-queues=2"], "'veth' is not a tap");
        error(
            &["--tap=busy", "--num-queues=2"],
            "tap 'busy' has a single queue",
        );
        error(
            &["--tap=single", "--num-queues=2"],
            "tap 'single' has a single queue",
        );
        error(
            &["--tap=tap%d", "--create"],
            "'tap%d' is not an interface name",
        );
        error(
            &["--tap=a-name-too-long-for-it"],
            "is not an interface name",
        );
        error(&["--tap-fd=0"], "--tap-fd=0 is not a tap's file descriptor");
        error(
            &["--tap-fd=77"],
            "--tap-fd=77 is not a tap's file descriptor",
        );
        let bare = attach("single", 0);
        let socket = SocketPath::new();
        let socket = format!("--socket-path={}", socket.display());
        let line = fails_with_stdin(1, &[&socket, "--tap-fd=0"], bare.into());
        assert!(line.contains("was made without IFF_VNET_HDR"), "{line}");
        assert!(!describe("single").contains("multi_queue"), "as it was");
    });
}
