//! Sockets of the tuner: `control`, which `status`, `watch` and `explain` ask, and metrics.
//!
//! Control is a line of JSON each way. A client has a second; one after the other is served, by a thread for each socket.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde::{Deserialize, Serialize};

use crate::report::{self, Explained, Published, Status};

const PATIENCE: Duration = Duration::from_secs(1);
/// A client that sends nothing for so long is answered plainly.
const PLAIN_AFTER: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 100_000_000,
};
/// Longest question.
const MOST: u64 = 1024;

/// What may be asked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Question {
    /// For a [`Status`].
    Status,
    /// For so many decisions, as [`Explained`].
    Explain(usize),
}

/// Where a tuner with that folder listens.
pub fn control_path(run_dir: &Path) -> PathBuf {
    run_dir.join("control.sock")
}

/// A socket that is removed when it is no longer served.
#[derive(Debug)]
pub(super) struct Served(PathBuf);

impl Drop for Served {
    fn drop(&mut self) {
        // Gone already is as good.
        let _ = std::fs::remove_file(&self.0);
    }
}

/// Serves questions.
pub(super) fn control(run_dir: &Path, published: Arc<Mutex<Published>>) -> io::Result<Served> {
    std::fs::create_dir_all(run_dir)?;
    let answer = move |stream: &mut UnixStream| {
        let mut line = String::new();
        BufReader::new(Read::take(&mut *stream, MOST)).read_line(&mut line)?;
        let text = match serde_json::from_str(&line) {
            Ok(question) => answer(&published, &question)?,
            Err(error) => serde_json::to_string(&format!("not a question: {error}"))?,
        };
        stream.write_all(text.as_bytes())?;
        stream.write_all(b"\n")
    };
    serve(&control_path(run_dir), "control", answer)
}

fn answer(published: &Mutex<Published>, question: &Question) -> io::Result<String> {
    let published = published.lock().unwrap_or_else(PoisonError::into_inner);
    let text = match question {
        Question::Status => serde_json::to_string::<Status>(&published.status),
        Question::Explain(count) => {
            serde_json::to_string::<Vec<Explained>>(&published.last(*count))
        }
    };
    Ok(text?)
}

/// Serves metrics: HTTP to who sends a request, plain to who sends nothing.
pub(super) fn metrics(path: &Path, published: Arc<Mutex<Published>>) -> io::Result<Served> {
    let answer = move |stream: &mut UnixStream| {
        let asks = poll(
            &mut [PollFd::new(stream, PollFlags::IN)],
            Some(&PLAIN_AFTER),
        )? > 0
            && stream.read(&mut [0; 4096])? > 0;
        let text = {
            let published = published.lock().unwrap_or_else(PoisonError::into_inner);
            report::metrics(&published.status)
        };
        if asks {
            write!(
                stream,
                "HTTP/1.0 200 OK\r\nContent-Type: text/plain; version=0.0.4\r\nContent-Length: {}\r\n\r\n",
                text.len()
            )?;
        }
        stream.write_all(text.as_bytes())
    };
    serve(path, "metrics", answer)
}

fn serve(
    path: &Path,
    name: &str,
    answer: impl Fn(&mut UnixStream) -> io::Result<()> + Send + 'static,
) -> io::Result<Served> {
    let listener = bind(path)?;
    let served = Served(path.to_owned());
    let work = move || {
        for stream in listener.incoming() {
            let result = stream.and_then(|mut stream| {
                stream.set_read_timeout(Some(PATIENCE))?;
                stream.set_write_timeout(Some(PATIENCE))?;
                answer(&mut stream)
            });
            if let Err(error) = result {
                tracing::debug!(%error, "a client");
            }
        }
    };
    thread::Builder::new().name(name.to_owned()).spawn(work)?;
    Ok(served)
}

/// Listens, for this user alone. A socket that a dead process left is taken over; a living one's is not.
fn bind(path: &Path) -> io::Result<UnixListener> {
    let listener = match UnixListener::bind(path) {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
            if UnixStream::connect(path).is_ok() {
                return Err(error);
            }
            std::fs::remove_file(path)?;
            UnixListener::bind(path)?
        }
        other => other?,
    };
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

/// Asks the tuner that runs with this folder.
pub fn ask(run_dir: &Path, question: &Question) -> io::Result<String> {
    let mut stream = UnixStream::connect(control_path(run_dir))?;
    stream.set_read_timeout(Some(5 * PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    let mut line = serde_json::to_string(question)?;
    line.push('\n');
    stream.write_all(line.as_bytes())?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    Ok(text)
}
