//! What a guest does in the moment in which it is paused: the driver, in this process, is told of it after the pause.

#![expect(clippy::unwrap_used, reason = "test code outside of test functions")]

mod support;

use std::sync::Arc;
use std::sync::mpsc::channel;
use std::thread::{self, JoinHandle};

use berth_vmm::vm::requests::{Command, Failure, Reply, ReplyTo, Request, RequestSender, Requests};
use berth_vmm::vm::state::{Action, VmState};
use berth_vmm::vm::{Driver, GuestEvent, Limits, Signals};
use berth_vmm::{args, kvm};
use support::{Code, PATIENCE, eventually, has_kvm};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::tempdir::TempDir;

/// A driver with a micro-guest that halts.
struct Driven {
    sender: RequestSender,
    thread: JoinHandle<u8>,
    _dir: TempDir,
}

impl Driven {
    fn start() -> Self {
        let dir = TempDir::new().unwrap();
        let kernel = dir.as_path().join("kernel");
        std::fs::write(&kernel, Code::new().halt().elf()).unwrap();
        let kernel = kernel.display().to_string();
        let line = ["berth-vmm", "--kernel", &kernel, "--memory", "size=32M"];
        let line = line.into_iter().chain(["--serial", "null"]);
        let Ok(options) = args::parse(line.map(Into::into)) else {
            panic!("a good command line");
        };
        let (sender, requests) = Requests::new().unwrap();
        let to_driver = sender.clone();
        let thread = thread::spawn(move || {
            let limits = Limits {
                host: kvm::host().unwrap(),
                api_socket: None,
                launcher: None,
            };
            let signals = Signals::new().unwrap();
            let mut driver = Driver::new(limits, signals, (to_driver, requests)).unwrap();
            driver.create(options.config.unwrap()).unwrap();
            driver.run().unwrap()
        });
        let driven = Self {
            sender,
            thread,
            _dir: dir,
        };
        driven.until(VmState::Running, 1);
        driven
    }

    fn ask(&self, command: Command) -> Result<Reply, Failure> {
        let (answers, answer) = channel();
        let event = Arc::new(EventFd::new(0).unwrap());
        let reply = ReplyTo::new(0, answers, event);
        self.sender.send(Request::Command(command, reply));
        answer.recv_timeout(PATIENCE).unwrap().1
    }

    fn act(&self, action: Action) {
        self.ask(Command::Act(action)).unwrap();
    }

    /// As from a vCPU of the first boot.
    fn guest(&self, event: GuestEvent) {
        self.sender.send(Request::Guest(1, event));
    }

    fn state(&self) -> VmState {
        match self.ask(Command::Info) {
            Ok(Reply::Info(info)) => info.state,
            other => panic!("{other:?}"),
        }
    }

    fn boots(&self) -> u64 {
        match self.ask(Command::Counters) {
            Ok(Reply::Counters(counters)) => counters["vmm"]["boots"],
            other => panic!("{other:?}"),
        }
    }

    fn until(&self, state: VmState, boots: u64) {
        eventually("the state", || {
            (self.state() == state && self.boots() == boots).then_some(())
        });
    }

    fn end(self) -> u8 {
        self.thread.join().unwrap()
    }
}

#[test]
fn a_reset_that_meets_a_pause_is_seen_after_it() {
    if !has_kvm() {
        return;
    }
    let driven = Driven::start();
    driven.act(Action::Pause);
    driven.guest(GuestEvent::Reset);
    // Requests are taken in order: this answer comes after the reset.
    assert_eq!((driven.state(), driven.boots()), (VmState::Paused, 1));
    driven.act(Action::Resume);
    driven.until(VmState::Running, 2);
    // Once: the next pause is one like any other.
    driven.act(Action::Pause);
    driven.act(Action::Resume);
    assert_eq!((driven.state(), driven.boots()), (VmState::Running, 2));
    driven.ask(Command::VmmShutdown).unwrap();
    assert_eq!(driven.end(), 0);
}

#[test]
fn what_meets_a_pause_is_forgotten_with_its_machine() {
    if !has_kvm() {
        return;
    }
    let driven = Driven::start();
    driven.act(Action::Pause);
    driven.guest(GuestEvent::Exit(7));
    assert_eq!(driven.state(), VmState::Paused);
    driven.act(Action::Reboot);
    driven.until(VmState::Running, 2);
    driven.act(Action::Pause);
    driven.act(Action::Resume);
    assert_eq!(driven.state(), VmState::Running);

    driven.act(Action::Pause);
    driven.sender.send(Request::Guest(2, GuestEvent::Exit(7)));
    assert_eq!(driven.state(), VmState::Paused);
    driven.act(Action::Resume);
    assert_eq!(driven.end(), 7);
}
