//! The main thread's wait: one epoll set whose events are typed tokens.
//!
//! Level-triggered: what is not dealt with is reported again. EINTR is retried. The `process_*`
//! functions of those who own the files know nothing of epoll, so tests call them directly.

#![forbid(unsafe_code)]

pub mod rest;

use std::cell::RefCell;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::time::Instant;

use self::rest::Rest;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

/// What has something to say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u64)]
pub enum Token {
    /// SIGTERM and SIGINT, by signalfd.
    Signal = 1,
    /// Requests of the API and events of the guest.
    Requests,
    /// Bytes for the guest's serial port.
    SerialInput,
    /// A client for the serial port's socket.
    SerialListener,
    /// The serial input queue has room again.
    SerialRoom,
    /// The guest ended an ACPI interrupt.
    SciResample,
}

const TOKENS: [Token; 6] = [
    Token::Signal,
    Token::Requests,
    Token::SerialInput,
    Token::SerialListener,
    Token::SerialRoom,
    Token::SciResample,
];

/// An epoll set.
pub struct EventLoop {
    epoll: Epoll,
    /// The file that rests, if one does.
    resting: RefCell<Option<(RawFd, Token, Rest)>>,
}

impl EventLoop {
    /// An empty set.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            epoll: Epoll::new()?,
            resting: RefCell::default(),
        })
    }

    /// Reports a file that is in the set no more for a moment, in which what it waits for may become possible. One
    /// at a time can rest.
    pub fn rest(&self, file: &impl AsRawFd, token: Token) {
        let mut rest = Rest::default();
        let until = Instant::now() + rest::AFTER_A_FAILURE;
        let file = file.as_raw_fd();
        rest.begin(&self.epoll, file, token as u64, Some(until));
        let before = self.resting.replace(Some((file, token, rest)));
        if let Some((file, token, mut rest)) = before {
            rest.end(&self.epoll, file, token as u64);
        }
    }

    /// Reports `token` as long as `file` can be read (or its other side hung up).
    pub fn add(&self, file: &impl AsRawFd, token: Token) -> io::Result<()> {
        let event = EpollEvent::new(EventSet::IN, token as u64);
        self.epoll
            .ctl(ControlOperation::Add, file.as_raw_fd(), event)
    }

    /// Reports the file no more; harmless for one that is not in the set.
    pub fn remove(&self, file: &impl AsRawFd) {
        let file = file.as_raw_fd();
        self.resting
            .borrow_mut()
            .take_if(|(resting, ..)| *resting == file);
        // ENOENT is the only error an open file can meet here.
        let _ = self
            .epoll
            .ctl(ControlOperation::Delete, file, EpollEvent::default());
    }

    /// Waits until something is ready.
    pub fn wait(&self) -> io::Result<Vec<Token>> {
        let mut events = [EpollEvent::default(); TOKENS.len()];
        loop {
            let deadline = match &mut *self.resting.borrow_mut() {
                Some((file, token, rest)) => {
                    rest.end_if_due(&self.epoll, *file, *token as u64);
                    rest.deadline()
                }
                None => None,
            };
            match self.epoll.wait(rest::timeout_ms(deadline), &mut events) {
                // What rested may be due.
                Ok(0) => {}
                Ok(count) => {
                    let ready = events[..count]
                        .iter()
                        .filter_map(|event| token(event.data()));
                    return Ok(ready.collect());
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }
}

fn token(data: u64) -> Option<Token> {
    TOKENS.into_iter().find(|token| *token as u64 == data)
}

/// What to wait for at one file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Interest {
    /// Bytes, or the end of them.
    Read,
    /// Room.
    Write,
}

/// Waits at one file for `timeout_ms` (-1: without end); returns whether it became ready.
pub fn poll_one(file: BorrowedFd<'_>, interest: Interest, timeout_ms: i32) -> io::Result<bool> {
    let epoll = Epoll::new()?;
    let set = match interest {
        Interest::Read => EventSet::IN,
        Interest::Write => EventSet::OUT,
    };
    epoll.ctl(
        ControlOperation::Add,
        file.as_fd().as_raw_fd(),
        EpollEvent::new(set, 0),
    )?;
    let mut events = [EpollEvent::default(); 1];
    loop {
        match epoll.wait(timeout_ms, &mut events) {
            Ok(count) => return Ok(count > 0),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmm_sys_util::eventfd::EventFd;

    #[test]
    fn ready_files_are_named_by_their_tokens() {
        let events = EventLoop::new().unwrap();
        let quiet = EventFd::new(0).unwrap();
        let ready = EventFd::new(0).unwrap();
        events.add(&quiet, Token::Signal).unwrap();
        events.add(&ready, Token::SerialRoom).unwrap();
        ready.write(1).unwrap();
        assert_eq!(events.wait().unwrap(), [Token::SerialRoom]);
        events.remove(&ready);
        events.remove(&ready);
        quiet.write(1).unwrap();
        assert_eq!(events.wait().unwrap(), [Token::Signal]);
    }

    #[test]
    fn what_rests_holds_up_nobody_and_is_reported_again() {
        let events = EventLoop::new().unwrap();
        let (listener, other) = (EventFd::new(0).unwrap(), EventFd::new(0).unwrap());
        events.add(&listener, Token::SerialListener).unwrap();
        events.add(&other, Token::Requests).unwrap();
        listener.write(1).unwrap();
        other.write(1).unwrap();
        events.rest(&listener, Token::SerialListener);
        assert_eq!(events.wait().unwrap(), [Token::Requests]);
        other.read().unwrap();
        // Nothing else happens: it waits until the rest is over.
        assert_eq!(events.wait().unwrap(), [Token::SerialListener]);
        events.rest(&listener, Token::SerialListener);
        events.remove(&listener);
        other.write(1).unwrap();
        assert_eq!(events.wait().unwrap(), [Token::Requests]);
    }

    #[test]
    fn every_token_comes_back_from_its_number() {
        for expected in TOKENS {
            assert_eq!(token(expected as u64), Some(expected));
        }
        assert_eq!(token(0), None);
    }
}
