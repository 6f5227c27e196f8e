//! The server over its socket, with a driver that answers from a script.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use vmm_sys_util::tempdir::TempDir;

use super::server::MAX_CLIENTS;
use super::{Api, bind, start};
use crate::event_loop::{EventLoop, Token};
use crate::socket::ApiSocket;
use crate::vm::requests::{Command, CounterGroups, Failure, Reply, Request, Requests};
use crate::vm::state::{Action, VmState, accept};

struct Served {
    api: Option<Api>,
    driver: JoinHandle<()>,
    path: PathBuf,
    _dir: TempDir,
}

/// A driver that knows states but has no machine; it ends at vmm.shutdown.
fn serve() -> Served {
    let dir = TempDir::new().unwrap();
    let path = dir.as_path().join("api");
    let (sender, requests) = Requests::new().unwrap();
    let driver = thread::spawn(move || drive(&requests));
    Served {
        api: Some(start(bind(&ApiSocket::Path(path.clone())).unwrap(), sender).unwrap()),
        driver,
        path,
        _dir: dir,
    }
}

fn drive(requests: &Requests) {
    let mut state = VmState::Running;
    let mut counters = CounterGroups::new();
    counters
        .entry("vcpu0".into())
        .or_default()
        .insert("exits_io_in".into(), 7);
    let events = EventLoop::new().unwrap();
    events.add(requests.event(), Token::Requests).unwrap();
    loop {
        events.wait().unwrap();
        for request in requests.take() {
            let Request::Command(command, reply) = request else {
                continue;
            };
            let last = matches!(command, Command::VmmShutdown);
            let answer = match command {
                Command::Act(action) => match accept(state, action) {
                    Ok(next) => {
                        state = next;
                        Ok(Reply::Done)
                    }
                    Err(refusal) => Err(Failure::from(refusal)),
                },
                Command::Counters => Ok(Reply::Counters(counters.clone())),
                Command::Info => Err(Failure::Failed("no configuration here".into())),
                Command::Create(_)
                | Command::Add(_)
                | Command::Remove(_)
                | Command::Resize(_)
                | Command::Tune(_)
                | Command::VmmShutdown => Ok(Reply::Done),
            };
            reply.send(answer);
            if last {
                return;
            }
        }
    }
}

fn client(path: &Path) -> UnixStream {
    let stream = UnixStream::connect(path).unwrap();
    stream
        .set_read_timeout(Some(Duration::from_secs(60)))
        .unwrap();
    stream
}

/// One request on a connection of its own; the answer whole. It is sent in one piece: one that has begun has
/// a deadline, which a test that is not given the processor would miss.
fn ask(path: &Path, method: &str, name: &str) -> String {
    let mut stream = client(path);
    let request = format!("{method} /api/v1/{name} HTTP/1.1\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

fn end(mut served: Served) {
    assert!(ask(&served.path, "PUT", "vmm.shutdown").starts_with("HTTP/1.1 204"));
    served.driver.join().unwrap();
    drop(served.api.take());
    assert!(!served.path.exists());
}

#[test]
fn a_client_pauses_and_resumes() {
    let served = serve();
    let path = served.path.clone();
    assert!(ask(&path, "GET", "vmm.ping").contains(&std::process::id().to_string()));
    assert!(ask(&path, "PUT", "vm.pause").starts_with("HTTP/1.1 204"));
    let refused = ask(&path, "PUT", "vm.pause");
    assert!(refused.starts_with("HTTP/1.1 500"), "{refused}");
    assert!(
        refused.ends_with(r#"["cannot Pause a guest that is Paused"]"#),
        "{refused}"
    );
    assert!(ask(&path, "PUT", "vm.resume").starts_with("HTTP/1.1 204"));
    let counters = ask(&path, "GET", "vm.counters");
    assert!(
        counters.ends_with(r#"{"vcpu0":{"exits_io_in":7}}"#),
        "{counters}"
    );
    end(served);
}

#[test]
fn a_stuck_client_holds_up_nobody() {
    let served = serve();
    let mut stuck = client(&served.path);
    stuck.write_all(b"GET /api/v1/vm.in").unwrap();
    for _ in 0..3 {
        assert!(ask(&served.path, "GET", "vmm.ping").starts_with("HTTP/1.1 200"));
    }
    // It is dropped at its deadline, which the read waits for.
    assert_eq!(stuck.read(&mut [0]).unwrap(), 0);
    end(served);
}

#[test]
fn more_clients_than_fit_push_out_the_idle() {
    let served = serve();
    let idle: Vec<_> = (0..100).map(|_| client(&served.path)).collect();
    assert!(ask(&served.path, "GET", "vmm.ping").starts_with("HTTP/1.1 200"));
    drop(idle);
    end(served);
}

#[test]
fn a_client_that_waits_for_an_answer_is_not_sent_away() {
    let dir = TempDir::new().unwrap();
    let path = dir.as_path().join("api");
    let (sender, requests) = Requests::new().unwrap();
    let _api = start(bind(&ApiSocket::Path(path.clone())).unwrap(), sender).unwrap();
    let events = EventLoop::new().unwrap();
    events.add(requests.event(), Token::Requests).unwrap();
    let request = b"GET /api/v1/vm.counters HTTP/1.1\r\nConnection: close\r\n\r\n";
    let mut replies = Vec::new();
    let mut clients = Vec::new();
    for count in 0..MAX_CLIENTS {
        let mut client = client(&path);
        client.write_all(request).unwrap();
        clients.push(client);
        // Answers are kept, and given below.
        while replies.len() <= count {
            events.wait().unwrap();
            for request in requests.take() {
                let Request::Command(_, reply) = request else {
                    panic!("no command");
                };
                replies.push(reply);
            }
        }
    }
    // Those that came later wait in the queue: all who are served have a question.
    let mut late = client(&path);
    late.set_read_timeout(Some(Duration::from_millis(1500)))
        .unwrap();
    let ping = b"GET /api/v1/vmm.ping HTTP/1.1\r\nConnection: close\r\n\r\n";
    late.write_all(ping).unwrap();
    assert!(late.read(&mut [0]).is_err(), "nobody has gone yet");
    for reply in replies {
        reply.send(Ok(Reply::Counters(CounterGroups::new())));
    }
    for client in &mut clients {
        let mut answer = String::new();
        client.read_to_string(&mut answer).unwrap();
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    }
    late.set_read_timeout(Some(Duration::from_secs(60)))
        .unwrap();
    let mut answer = String::new();
    late.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
}

#[test]
fn after_the_driver_the_api_says_so() {
    let mut served = serve();
    assert!(ask(&served.path, "PUT", "vmm.shutdown").starts_with("HTTP/1.1 204"));
    served.driver.join().unwrap();
    assert_eq!(accept(VmState::Shutdown, Action::Pause).ok(), None);
    assert!(ask(&served.path, "GET", "vm.info").contains("the VMM is ending"));
    drop(served.api.take());
}
