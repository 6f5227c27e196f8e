//! The socket on which an operator asks a running daemon for things: `--control-socket=PATH`.
//!
//! ```text
//!   client ── "resize\n" ──▶ thread "control-socket" ──▶ answer(line)
//!          ◀── "ok …\n" or "error …\n" ──────────────────────┘
//! ```
//!
//! One line of at most [`MAX_LINE`] bytes asks, one line answers, in order; a connection may carry
//! any number of them. The last line needs no newline where the client closes its sending side.
//!
//! A client can do no harm beyond the commands themselves: all have one thread to themselves, which
//! waits for none of them. One that sends a longer line, or does not read its answers, is cut off;
//! of more than [`MAX_CLIENTS`], the one that has been quiet for longest is.
#![forbid(unsafe_code)]

use std::io::{self, ErrorKind, Read as _, Write as _};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread::JoinHandle;

use tracing::{error, warn};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EventFd};

use crate::endpoint::Listener;
use crate::sandbox::{self, ThreadKind};
use crate::sys;

/// Longest line of a client, newline included.
pub const MAX_LINE: usize = 256;
/// Most clients at a time.
pub const MAX_CLIENTS: usize = 8;

/// A command: its name and what it does.
pub type Command = (&'static str, &'static str);

/// Answers the control socket until dropped.
#[derive(Debug)]
pub struct ControlServer {
    stop: EventFd,
    thread: Option<JoinHandle<()>>,
    /// After the thread, which shares it: removed on the thread that drops this.
    _listener: Arc<Listener>,
}

impl ControlServer {
    /// Answers on `listener`. `answer` gets each line without its newline, on the server's thread, and
    /// returns the text of the answer: after `ok` or after `error`.
    pub fn start(
        listener: Listener,
        answer: impl Fn(&str) -> Result<String, String> + Send + 'static,
    ) -> io::Result<ControlServer> {
        let stop = EventFd::new(EFD_CLOEXEC)?;
        let thread_stop = stop.try_clone()?;
        let listener = Arc::new(listener);
        let shared = Arc::clone(&listener);
        let thread = std::thread::Builder::new()
            .name("control-socket".to_owned())
            .spawn(move || match sandbox::enter_thread(ThreadKind::Helper) {
                Ok(()) => serve(&shared, &thread_stop, &answer),
                Err(error) => error!(%error, "no sandbox for this thread, so no commands"),
            })?;
        Ok(ControlServer {
            stop,
            thread: Some(thread),
            _listener: listener,
        })
    }
}

impl Drop for ControlServer {
    fn drop(&mut self) {
        let _ = self.stop.write(1);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Finds `line` among `commands`; the error for an unknown one names the nearest.
pub fn find(commands: &[Command], line: &str) -> Result<&'static str, String> {
    let known = commands.iter().map(|(name, _)| *name);
    if let Some(name) = known.clone().find(|name| *name == line) {
        return Ok(name);
    }
    let similarity = |name: &&str| strsim::jaro_winkler(line, name);
    let nearest = known.max_by(|a, b| similarity(a).total_cmp(&similarity(b)));
    let nearest = nearest.filter(|name| similarity(name) >= 0.6);
    Err(match nearest {
        Some(name) => format!("unknown command {line:?} (nearest: '{name}')"),
        None => format!("unknown command {line:?} (try 'help')"),
    })
}

type Answer<'a> = &'a dyn Fn(&str) -> Result<String, String>;

fn serve(listener: &Listener, stop: &EventFd, answer: Answer) {
    // The one heard of last is at the end.
    let mut clients: Vec<Client> = Vec::new();
    let mut slots = Vec::new();
    loop {
        slots.clear();
        slots.push(sys::poll_slot(stop.as_raw_fd(), libc::POLLIN));
        slots.push(sys::poll_slot(listener.as_fd().as_raw_fd(), libc::POLLIN));
        let fds = clients.iter().map(|client| client.stream.as_raw_fd());
        slots.extend(fds.map(|fd| sys::poll_slot(fd, libc::POLLIN)));
        if sys::poll(&mut slots, -1).is_err() || slots[0].revents != 0 {
            return;
        }
        let (ready, quiet): (Vec<_>, Vec<_>) = clients
            .into_iter()
            .zip(&slots[2..])
            .partition(|(_, slot)| slot.revents != 0);
        clients = quiet.into_iter().map(|(client, _)| client).collect();
        for (mut client, _) in ready {
            // An error is the end of that client, whoever's fault it is.
            if client.receive(answer).unwrap_or(false) {
                clients.push(client);
            }
        }
        if slots[1].revents == 0 {
            continue;
        }
        match listener.accept() {
            Ok(Some(stream)) if stream.set_nonblocking(true).is_ok() => {
                if clients.len() == MAX_CLIENTS {
                    clients.remove(0);
                }
                clients.push(Client {
                    stream,
                    line: Vec::new(),
                });
            }
            Ok(_) => {}
            Err(error) => {
                warn!(%error, "control socket failed, no more commands");
                return;
            }
        }
    }
}

struct Client {
    stream: UnixStream,
    /// What has come of the next line.
    line: Vec<u8>,
}

impl Client {
    /// Reads once and answers every line that is whole; false where that was the last one.
    fn receive(&mut self, answer: Answer) -> io::Result<bool> {
        let mut bytes = [0; MAX_LINE];
        let got = match self.stream.read(&mut bytes) {
            Ok(got) => got,
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(true),
            Err(error) if error.kind() == ErrorKind::Interrupted => return Ok(true),
            Err(error) => return Err(error),
        };
        if got == 0 && !self.line.is_empty() {
            self.line.push(b'\n');
        }
        self.line.extend(&bytes[..got]);
        while let Some(end) = self.line.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = self.line.drain(..=end).collect();
            if line.len() > MAX_LINE {
                return self.refuse();
            }
            let text = String::from_utf8_lossy(&line);
            self.say(&answer(text.trim()))?;
        }
        if self.line.len() >= MAX_LINE {
            return self.refuse();
        }
        Ok(got != 0)
    }

    fn refuse(&mut self) -> io::Result<bool> {
        self.say(&Err(format!("a line is longer than {MAX_LINE} bytes")))?;
        Ok(false)
    }

    /// One line, whole or not at all: a client that does not read is cut off.
    fn say(&mut self, result: &Result<String, String>) -> io::Result<()> {
        let (word, text) = match result {
            Ok(text) => ("ok", text),
            Err(text) => ("error", text),
        };
        let text = text.replace(['\n', '\r'], " ");
        let line = format!("{word} {text}");
        self.stream
            .write_all(format!("{}\n", line.trim_end()).as_bytes())
    }
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader};
    use std::net::Shutdown;
    use std::path::PathBuf;
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;
    use crate::testing::TIMEOUT;

    struct Server {
        path: PathBuf,
        _server: ControlServer,
    }

    impl Server {
        fn start() -> Server {
            static COUNT: AtomicU32 = AtomicU32::new(0);
            let n = COUNT.fetch_add(1, Ordering::Relaxed);
            let name = format!("berth-control-{}-{n}.sock", std::process::id());
            let path = std::env::temp_dir().join(name);
            let commands = [("shout", ""), ("lines", "")];
            let answer = move |line: &str| match find(&commands, line)? {
                "lines" => Ok("one\ntwo".to_owned()),
                _ => Ok(line.to_uppercase()),
            };
            let server = ControlServer::start(Listener::bind(&path).unwrap(), answer).unwrap();
            Server {
                path,
                _server: server,
            }
        }

        fn connect(&self) -> UnixStream {
            let stream = UnixStream::connect(&self.path).unwrap();
            stream.set_read_timeout(Some(TIMEOUT)).unwrap();
            stream
        }

        /// Sends everything, closes that side, and reads to the end.
        fn ask(&self, bytes: &[u8]) -> String {
            let mut stream = self.connect();
            stream.write_all(bytes).unwrap();
            stream.shutdown(Shutdown::Write).unwrap();
            let mut text = String::new();
            stream.read_to_string(&mut text).unwrap();
            text
        }
    }

    #[test]
    fn each_line_is_answered_by_one_line_in_order() {
        let server = Server::start();
        let said = server.ask(b"shout\n shout \r\nlines\nshouts\nzzz\n\nshout");
        let lines: Vec<_> = said.lines().collect();
        assert_eq!(
            lines,
            [
                "ok SHOUT",
                "ok SHOUT",
                "ok one two",
                "error unknown command \"shouts\" (nearest: 'shout')",
                "error unknown command \"zzz\" (try 'help')",
                "error unknown command \"\" (try 'help')",
                "ok SHOUT",
            ]
        );
    }

    #[test]
    fn a_line_in_pieces_is_one_line_and_a_quiet_client_holds_up_nobody() {
        let server = Server::start();
        let mut slow = server.connect();
        slow.write_all(b"sho").unwrap();
        assert_eq!(server.ask(b"shout\n"), "ok SHOUT\n");
        slow.write_all(b"ut\n").unwrap();
        let mut line = String::new();
        BufReader::new(&slow).read_line(&mut line).unwrap();
        assert_eq!(line, "ok SHOUT\n");
    }

    #[test]
    fn hostile_clients_are_cut_off_and_the_next_one_is_served() {
        let server = Server::start();
        // Endless line.
        let said = server.ask(&[b'x'; MAX_LINE]);
        assert_eq!(said, "error a line is longer than 256 bytes\n");
        // Bytes that are no text.
        assert!(server.ask(&[0xff, 0, b'\n']).starts_with("error unknown"));
        // One that asks and asks and never reads: its connection ends, ours do not.
        let mut deaf = server.connect();
        deaf.set_write_timeout(Some(TIMEOUT)).unwrap();
        while deaf.write_all(b"shout\n").is_ok() {}
        assert_eq!(server.ask(b"shout\n"), "ok SHOUT\n");
    }

    #[test]
    fn of_too_many_clients_the_one_that_was_quiet_for_longest_goes() {
        let server = Server::start();
        let mut clients: Vec<_> = (0..MAX_CLIENTS).map(|_| server.connect()).collect();
        // All are known before the next one comes.
        for client in &mut clients {
            client.write_all(b"shout\n").unwrap();
            let mut line = String::new();
            BufReader::new(&*client).read_line(&mut line).unwrap();
        }
        assert_eq!(server.ask(b"shout\n"), "ok SHOUT\n");
        assert_eq!(clients[0].read(&mut [0; 1]).unwrap(), 0, "still there");
        let mut last = clients.pop().unwrap();
        last.write_all(b"shout\n").unwrap();
        let mut line = String::new();
        BufReader::new(&last).read_line(&mut line).unwrap();
        assert_eq!(line, "ok SHOUT\n");
    }
}
