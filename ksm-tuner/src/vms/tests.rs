//! The client against VMMs that answer, are silent, or lie.

use super::*;
use std::io::Write;
use std::os::unix::net::UnixListener;
use std::thread;

use crate::testing::Folder;

/// A VMM that gives the same answers to whoever asks, until the folder is gone.
fn serve(path: &Path, answers: &'static [(&'static str, &'static str)]) {
    let listener = UnixListener::bind(path).unwrap();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { return };
            let mut request = Vec::new();
            let mut byte = [0];
            while !request.ends_with(b"\r\n\r\n") {
                match stream.read(&mut byte) {
                    Ok(1) => request.push(byte[0]),
                    _ => break,
                }
            }
            let request = String::from_utf8_lossy(&request).into_owned();
            let length = request
                .lines()
                .find_map(|line| line.strip_prefix("Content-Length: "));
            let length = length.map_or(0, |length| length.parse().unwrap());
            // All of it is read, or the end of the connection would lose the answer.
            let mut body = vec![0; length];
            let _ = stream.read_exact(&mut body);
            let found = answers.iter().find(|(start, _)| request.starts_with(start));
            let (status, body) = match found {
                Some((_, body)) => ("200 OK", *body),
                None => ("404 Not Found", r#"["there is no such thing"]"#),
            };
            let answer = format!(
                "HTTP/1.1 {status}\r\nContent-Length: {}\r\n\r\n{body}",
                body.len()
            );
            // A client that has gone is its own concern.
            let _ = stream.write_all(answer.as_bytes());
        }
    });
}

const PING: (&str, &str) = (
    "GET /api/v1/vmm.ping",
    r#"{"version": "1", "pid": 4000000}"#,
);
const INFO: (&str, &str) = (
    "GET /api/v1/vm.info",
    r#"{"config": {"cpus": {"boot_vcpus": 1, "max_vcpus": 1}, "memory": {"size": 1073741824}}, "state": "Running",
       "balloon": {"target": 5, "actual": 4, "stats_age_ms": 100,
                   "stats": {"total_memory": 1000, "available_memory": 500, "oom_kill": 2}}}"#,
);
const SAMPLE: (&str, &str) = (
    "GET /api/v1/vm.memory-sample",
    r#"{"trust_domain": "farm", "mergeable": [{"start": 0, "len": 8192}], "offered": [{"start": 4096, "len": 4096}]}"#,
);

fn roots(folder: &Folder) -> Roots {
    Roots {
        proc: folder.path().join("proc"),
        sys: folder.path().join("sys"),
        cgroup: None,
    }
}

#[test]
fn a_folder_of_vms_is_looked_at() {
    let folder = Folder::new();
    serve(&folder.path().join("a.sock"), &[PING, INFO, SAMPLE]);
    serve(&folder.path().join("b"), &[PING, INFO]);
    serve(&folder.path().join("empty.sock"), &[PING]);
    std::fs::write(folder.path().join("file"), "").unwrap();
    let mut directory = Directory::new(folder.path());
    let vms = directory.look(&roots(&folder), 0);
    assert_eq!(vms.keys().collect::<Vec<_>>(), ["a", "b"]);
    let a = &vms["a"];
    assert_eq!((a.pid, a.running, a.size_bytes), (4_000_000, true, 1 << 30));
    assert_eq!((a.mergeable_bytes, a.advised_bytes), (8192, 4096));
    assert_eq!(a.domain.as_deref(), Some("farm"));
    let balloon = a.balloon.unwrap();
    assert_eq!((balloon.target_bytes, balloon.actual_bytes), (5, 4));
    let guest = balloon.guest.unwrap();
    assert_eq!(
        (guest.available_bytes, guest.oom_kills, guest.swap_in),
        (500, Some(2), None)
    );
    assert_eq!(
        (vms["b"].domain.clone(), vms["b"].mergeable_bytes),
        (None, 0)
    );
    assert!(directory.socket("b").unwrap().ends_with("b"));
}

#[test]
fn who_does_not_answer_is_left_alone_for_longer_and_longer() {
    let folder = Folder::new();
    // Takes clients, never answers: its socket is kept, nobody accepts.
    let path = folder.path().join("mute.sock");
    let _listener = UnixListener::bind(&path).unwrap();
    serve(&folder.path().join("nonsense.sock"), &[("GET", "hello")]);
    let mut directory = Directory::new(folder.path());
    let roots = roots(&folder);
    assert!(directory.look(&roots, 0).is_empty());
    let rest = |directory: &Directory| directory.silent["mute"].until_ms;
    assert_eq!(rest(&directory), 1000);
    assert!(directory.look(&roots, 500).is_empty());
    assert_eq!(rest(&directory), 1000, "not asked again");
    assert!(directory.look(&roots, 1000).is_empty());
    assert_eq!(rest(&directory), 3000);
    std::fs::remove_file(&path).unwrap();
    assert!(directory.look(&roots, 5000).is_empty());
    assert_eq!(
        directory.silent.get("mute").map(|silent| silent.rest_ms),
        None
    );
}

#[test]
fn a_refusal_says_what_was_asked_and_why() {
    let folder = Folder::new();
    let path = folder.path().join("a.sock");
    serve(&path, &[]);
    let error = advise(&path, "farm", true, &[]).unwrap_err().to_string();
    assert_eq!(error, "PUT vm.memory-advice: 404: there is no such thing");
    let error = resize(&folder.path().join("none"), 1).unwrap_err();
    assert!(error.to_string().ends_with("none"), "{error}");
}

#[test]
fn figures_of_long_ago_are_none() {
    let said = |age: u64| {
        balloon(&json!({"target": 1, "actual": 1, "stats_age_ms": age,
            "stats": {"total_memory": 10, "available_memory": 5}}))
    };
    assert!(said(10).unwrap().guest.is_some());
    assert!(said(60_000).unwrap().guest.is_none());
    assert_eq!(balloon(&Value::Null), None);
}

#[test]
fn ranges_that_touch_are_one() {
    let joined = joined(&[(0, 5), (5, 5), (20, 1)]);
    let ranges: Vec<_> = joined
        .iter()
        .map(|range| (range.start, range.len))
        .collect();
    assert_eq!(ranges, [(0, 10), (20, 1)]);
}

#[test]
fn a_key_is_new_and_not_shown() {
    let (a, b) = (Key::random().unwrap(), Key::random().unwrap());
    assert_eq!(a.hex().len(), 32);
    assert_ne!(a.hex(), b.hex());
    assert_eq!(format!("{a:?}"), "Key(…)");
}
