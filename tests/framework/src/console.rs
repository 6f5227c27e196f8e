//! A guest's serial line: its log, and commands through the agent that tests/lab puts into the guest.
//!
//! The agent's protocol is in tests/lab/README.md. We write `run ID BASE64`; the guest answers
//! `<<ID`, its output as lines `ID| text`, and `>>ID STATUS`. Other text on the line, of the kernel say,
//! is kept in the log and passed over.
//!
//! An emulated UART was seen to lose a command on its way in (of some 80 guests that QEMU migrated, three: the
//! guest was well and idle, its UART empty, the agent waited for a line, and answered the next command).
//! [`Console::resend_lost`] is for such lines: a command that the guest does not echo is sent again, in a
//! form that runs once whichever of them arrives.
//!
//! One thread reads the line, writes the log as it comes and keeps whole lines for those who wait;
//! it ends with the line's EOF, when the VMM is gone.

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::wait::{Broken, patient};

/// What the agent says when it is ready for commands.
pub const READY: &str = "berth-agent ready";

/// What a command left behind.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Output {
    /// Exit code.
    pub rc: i32,
    /// Standard output and standard error.
    pub stdout: String,
}

/// Lines that came, shared with the reader thread.
#[derive(Debug, Default)]
struct Received {
    lines: Vec<String>,
    partial: Vec<u8>,
    closed: bool,
}

/// Protects [`Received`]; no lock is taken while it is held.
#[derive(Debug, Default)]
struct Line {
    received: Mutex<Received>,
    arrived: Condvar,
}

impl Line {
    fn lock(&self) -> MutexGuard<'_, Received> {
        self.received.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The host's end of a guest's serial line.
#[derive(Debug)]
pub struct Console {
    stream: UnixStream,
    line: Arc<Line>,
    /// Index of the first line that nobody has waited for yet.
    cursor: usize,
    commands: u32,
    /// Where commands get lost: after how long without `<<ID` one is sent again.
    resend_after: Option<Duration>,
    /// Tells this console's commands from those of others to the same guest, which may have migrated.
    number: usize,
}

impl Console {
    /// Reads `stream` from now on; everything that comes goes to the file `log`.
    ///
    /// # Errors
    /// The log cannot be made.
    pub fn new(stream: UnixStream, log: &Path) -> Result<Self> {
        let log = File::create(log).with_context(|| log.display().to_string())?;
        stream.set_write_timeout(Some(Duration::from_secs(30)))?;
        let line = Arc::new(Line::default());
        static NEXT: AtomicUsize = AtomicUsize::new(0);
        let (reader, shared) = (stream.try_clone()?, Arc::clone(&line));
        std::thread::Builder::new()
            .name("console".to_owned())
            .spawn(move || read_line(reader, log, &shared))?;
        Ok(Self {
            stream,
            line,
            cursor: 0,
            commands: 0,
            resend_after: None,
            number: NEXT.fetch_add(1, Ordering::Relaxed),
        })
    }

    /// From now on, a command whose begin the guest does not tell within `limit` is sent again.
    pub fn resend_lost(&mut self, limit: Duration) {
        self.resend_after = Some(limit);
    }

    /// Waits for the agent of a guest that boots, or boots again.
    ///
    /// # Errors
    /// It does not come in time, or the line is closed.
    pub fn wait_ready(&mut self, limit: Duration) -> Result<()> {
        self.wait_line(READY, limit).map(drop)
    }

    /// Waits for a line that contains `text`, after all lines waited for before; returns it.
    ///
    /// # Errors
    /// It does not come in time, or the line is closed.
    pub fn wait_line(&mut self, text: &str, limit: Duration) -> Result<String> {
        self.next_line(&format!("'{text}' on the console"), limit, |line| {
            line.contains(text).then(|| line.to_owned())
        })
    }

    /// Runs a command in the guest; within a minute unless it is broken.
    ///
    /// # Errors
    /// No answer: the story is over. A command that fails is no error.
    pub fn run(&mut self, command: &str) -> Result<Output> {
        self.run_within(command, Duration::from_secs(60))
    }

    /// Runs a command in the guest and gives it `limit`.
    ///
    /// # Errors
    /// As [`Console::run`].
    pub fn run_within(&mut self, command: &str, limit: Duration) -> Result<Output> {
        let id = self.start(command)?;
        self.finish(id, command, limit)
    }

    /// Sends a command without waiting for its end; its number is for [`Console::finish`].
    ///
    /// # Errors
    /// The line takes no more input.
    pub fn start(&mut self, command: &str) -> Result<u32> {
        self.commands += 1;
        self.send(self.commands, command)?;
        Ok(self.commands)
    }

    fn send(&mut self, id: u32, command: &str) -> Result<()> {
        let mut script = String::new();
        if self.resend_after.is_some() {
            script = format!(
                "mkdir /tmp/once-{}-{id} 2>/dev/null || exit 0\n",
                self.number
            );
        }
        script += command;
        let request = format!("run {id} {}\n", base64(script.as_bytes()));
        self.stream
            .write_all(request.as_bytes())
            .map_err(|error| Broken::Gone(format!("console takes no input: {error}")))?;
        Ok(())
    }

    /// Waits until the guest has begun with a command, and sends it again where it seems lost.
    fn wait_begun(&mut self, id: u32, command: &str, limit: Duration) -> Result<()> {
        let Some(after) = self.resend_after else {
            return Ok(());
        };
        let begin = format!("<<{id}");
        let end = Instant::now() + patient(limit);
        loop {
            let what = format!("begin of guest command '{command}'");
            let begun = self.next_line(&what, after, |line| line.ends_with(&begin).then_some(()));
            match begun {
                Err(error) if is_deadline(&error) && Instant::now() < end => {
                    // The end of line is for what may have arrived of it.
                    let _ = self.stream.write_all(b"\n");
                    self.send(id, command)?;
                }
                other => return other,
            }
        }
    }

    /// Waits for the end of a started command.
    ///
    /// # Errors
    /// As [`Console::run`].
    pub fn finish(&mut self, id: u32, command: &str, limit: Duration) -> Result<Output> {
        self.wait_begun(id, command, limit)?;
        let (text, end) = (format!("{id}| "), format!(">>{id} "));
        let mut stdout = String::new();
        let rc = self.next_line(
            &format!("end of guest command '{command}'"),
            limit,
            |line| {
                if let Some(output) = line.strip_prefix(&text) {
                    stdout.push_str(output);
                    stdout.push('\n');
                }
                line.strip_prefix(&end)
                    .map(|status| status.trim().parse::<i32>())
            },
        )?;
        Ok(Output {
            rc: rc.context("the agent's status is no number")?,
            stdout,
        })
    }

    /// Runs a command that must succeed; what it printed.
    ///
    /// # Errors
    /// It failed, or there was no answer.
    pub fn sh(&mut self, command: &str) -> Result<String> {
        self.sh_within(command, Duration::from_secs(60))
    }

    /// As [`Console::sh`], with a limit of one's own.
    ///
    /// # Errors
    /// As [`Console::sh`].
    pub fn sh_within(&mut self, command: &str, limit: Duration) -> Result<String> {
        let output = self.run_within(command, limit)?;
        if output.rc != 0 {
            bail!(
                "guest: '{command}' ended with {}: {}",
                output.rc,
                output.stdout.trim_end()
            );
        }
        Ok(output.stdout)
    }

    /// Waits until the line is closed: the VMM ended.
    ///
    /// # Errors
    /// It is still open after `limit`.
    pub fn wait_closed(&self, limit: Duration) -> Result<()> {
        let guard = self.line.lock();
        let (guard, _) = self
            .line
            .arrived
            .wait_timeout_while(guard, patient(limit), |received| !received.closed)
            .unwrap_or_else(PoisonError::into_inner);
        if guard.closed {
            Ok(())
        } else {
            Err(Broken::deadline("end of the console", limit))
        }
    }

    /// Hands lines to `take` from the cursor on until it returns something.
    fn next_line<T>(
        &mut self,
        what: &str,
        limit: Duration,
        mut take: impl FnMut(&str) -> Option<T>,
    ) -> Result<T> {
        let end = Instant::now() + patient(limit);
        let mut guard = self.line.lock();
        loop {
            while let Some(line) = guard.lines.get(self.cursor) {
                self.cursor += 1;
                if let Some(value) = take(line) {
                    return Ok(value);
                }
            }
            if guard.closed {
                return Err(Broken::Gone(format!("console closed before {what}")).into());
            }
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(Broken::deadline(what, limit));
            }
            guard = self
                .line
                .arrived
                .wait_timeout(guard, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        // Ends the reader thread when the VMM has not done so.
        let _ = self.stream.shutdown(std::net::Shutdown::Both);
    }
}

fn is_deadline(error: &anyhow::Error) -> bool {
    matches!(error.downcast_ref(), Some(Broken::Deadline { .. }))
}

/// Body of the reader thread.
fn read_line(mut stream: UnixStream, mut log: File, line: &Line) {
    let mut buffer = [0u8; 4096];
    loop {
        let count = match stream.read(&mut buffer) {
            Ok(0) => break,
            Ok(count) => count,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
            Err(_) => break,
        };
        // A full disk shows elsewhere; the run goes on without the log.
        let _ = log.write_all(&buffer[..count]);
        line.lock().add(&buffer[..count]);
        line.arrived.notify_all();
    }
    line.lock().closed = true;
    line.arrived.notify_all();
}

impl Received {
    /// Splits what came into lines without their ends.
    fn add(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            match byte {
                b'\n' => {
                    let text = String::from_utf8_lossy(&self.partial).into_owned();
                    self.lines.push(text.trim_end_matches('\r').to_owned());
                    self.partial.clear();
                }
                _ => self.partial.push(byte),
            }
        }
    }
}

/// RFC 4648 base64 with padding.
fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for chunk in bytes.chunks(3) {
        let mut group = [0u8; 4];
        group[1..=chunk.len()].copy_from_slice(chunk);
        let bits = u32::from_be_bytes(group);
        for place in 0..4 {
            if place > chunk.len() {
                text.push('=');
            } else {
                let digit = (bits >> (18 - 6 * place)) & 63;
                text.push(char::from(DIGITS[digit as usize]));
            }
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{BufRead, BufReader};

    fn pair(name: &str) -> (Console, UnixStream) {
        let (ours, guest) = UnixStream::pair().expect("a socket pair");
        let log = crate::testing::TempPath::new(name);
        let console = Console::new(ours, &log).expect("a console");
        (console, guest)
    }

    #[test]
    fn base64_pads_as_the_rfc_says() {
        for (plain, coded) in [
            ("", ""),
            ("f", "Zg=="),
            ("fo", "Zm8="),
            ("foo", "Zm9v"),
            ("foobar", "Zm9vYmFy"),
        ] {
            assert_eq!(base64(plain.as_bytes()), coded);
        }
    }

    #[test]
    fn a_command_answers_between_kernel_messages() {
        let (mut console, mut guest) = pair("answer");
        let agent = std::thread::spawn(move || {
            let mut line = String::new();
            BufReader::new(guest.try_clone().expect("clone"))
                .read_line(&mut line)
                .expect("a line");
            guest
                .write_all(b"<<1\r\n1| one\r\n[ 3.1] noise\r\n1| two\r\n>>1 3\r\n")
                .expect("an answer");
            line
        });
        let output = console.run("false").expect("an answer");
        assert_eq!(
            output,
            Output {
                rc: 3,
                stdout: "one\ntwo\n".to_owned()
            }
        );
        assert_eq!(agent.join().expect("agent"), "run 1 ZmFsc2U=\n");
    }

    #[test]
    fn a_command_that_got_lost_is_sent_again_and_runs_once() {
        let (mut console, guest) = pair("lost");
        console.resend_lost(Duration::from_millis(1));
        let agent = std::thread::spawn(move || {
            let mut lines = BufReader::new(guest.try_clone().expect("clone")).lines();
            let mut line = || lines.next().expect("a line").expect("a line");
            // The first one gets lost.
            let lost = line();
            assert_eq!(line(), "");
            assert_eq!(line(), lost);
            (&guest)
                .write_all(b"<<1\r\n1| done\r\n>>1 0\r\n<<1\r\n>>1 0\r\n")
                .expect("an answer");
            // Until the other side has what it wants.
            while lines.next().is_some() {}
        });
        assert_eq!(console.sh("true").expect("an answer"), "done\n");
        drop(console);
        agent.join().expect("agent");
    }

    #[test]
    fn a_closed_line_breaks_the_story_at_once() {
        let (mut console, guest) = pair("closed");
        drop(guest);
        let error = console
            .wait_ready(Duration::from_secs(60))
            .expect_err("closed");
        assert!(crate::wait::is_broken(&error));
        console
            .wait_closed(Duration::from_secs(60))
            .expect("closed");
    }
}
