//! The host's end of the serial port, owned by the event loop.
#![expect(unsafe_code, reason = "openpty has no safe wrapper")]

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use super::output::Output;
use super::port::Input;
use super::sink::Sink;
use super::tty::RawMode;
use crate::config::SerialConfig;
use crate::event_loop::{EventLoop, Token};
use crate::socket::{self, Listener};
use crate::telemetry::LogLimit;

/// How long the end of the process waits for a reader to take what is left.
const FLUSH_PATIENCE: Duration = Duration::from_millis(500);

static NO_CLIENT: LogLimit = LogLimit::new(Duration::from_secs(10));

/// Why the serial port has no place to go.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file cannot be made.
    #[error("cannot create the serial file {}", .path.display())]
    File {
        /// Its path.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// The socket cannot be listened on.
    #[error("serial socket")]
    Socket(#[from] socket::Error),
    /// No pseudo-terminal.
    #[error("cannot make a pseudo-terminal")]
    Pty(#[source] io::Error),
    /// The VMM's terminal, or a thread or event for it.
    #[error("cannot set up the serial port")]
    Setup(#[source] io::Error),
}

enum Place {
    /// Nothing to read: file, null, off.
    WriteOnly,
    /// Standard input and output.
    Terminal { input: File, _raw: Option<RawMode> },
    /// A pseudo-terminal; the other side is held open so that it never hangs up.
    Pty {
        master: Arc<File>,
        _slave: OwnedFd,
        path: PathBuf,
    },
    /// A socket and the client that has joined.
    Socket {
        listener: Listener,
        client: Option<Arc<UnixStream>>,
    },
}

/// The host's end, with the queues that a port is made with.
pub struct SerialHost {
    place: Place,
    input: Arc<Input>,
    output: Output,
}

impl SerialHost {
    /// Opens what the configuration names. `Off` is the same as `Null` here: there is no port.
    pub fn open(config: &SerialConfig) -> Result<Self, Error> {
        let (place, output) = match config {
            SerialConfig::Null | SerialConfig::Off => (Place::WriteOnly, Output::unread()),
            SerialConfig::File(path) => {
                let file = create(path).map_err(|source| Error::File {
                    path: path.clone(),
                    source,
                })?;
                (Place::WriteOnly, to(Sink::File(Arc::new(file)))?)
            }
            SerialConfig::Tty => open_terminal()?,
            SerialConfig::Pty => open_pty()?,
            SerialConfig::Socket(path) => {
                let place = Place::Socket {
                    listener: Listener::bind(path)?,
                    client: None,
                };
                (place, to(Sink::Nobody)?)
            }
        };
        Ok(Self {
            place,
            input: Arc::new(Input::new().map_err(Error::Setup)?),
            output,
        })
    }

    /// Where the port's output goes.
    pub fn output(&self) -> Output {
        self.output.clone()
    }

    /// Where the port's input comes from.
    pub fn input(&self) -> Arc<Input> {
        Arc::clone(&self.input)
    }

    /// Name of the pseudo-terminal, if it is one.
    pub fn pty_path(&self) -> Option<&Path> {
        match &self.place {
            Place::Pty { path, .. } => Some(path),
            _ => None,
        }
    }

    /// Puts everything that is read into the event loop.
    pub fn watch(&self, events: &EventLoop) -> io::Result<()> {
        events.add(self.input.room_event(), Token::SerialRoom)?;
        match &self.place {
            Place::Socket { listener, .. } => events.add(listener, Token::SerialListener),
            _ => self.watch_input(events),
        }
    }

    /// Takes everything out of the event loop again.
    pub fn unwatch(&self, events: &EventLoop) {
        events.remove(self.input.room_event());
        if let Place::Socket { listener, .. } = &self.place {
            events.remove(listener);
        }
        self.unwatch_input(events);
    }

    fn watch_input(&self, events: &EventLoop) -> io::Result<()> {
        match &self.place {
            Place::WriteOnly | Place::Socket { client: None, .. } => Ok(()),
            Place::Terminal { input, .. } => match events.add(input, Token::SerialInput) {
                // A file or /dev/null instead of a terminal has no input to wait for.
                Err(error) if error.kind() == io::ErrorKind::PermissionDenied => Ok(()),
                other => other,
            },
            Place::Pty { master, .. } => events.add(&**master, Token::SerialInput),
            Place::Socket {
                client: Some(client),
                ..
            } => events.add(&**client, Token::SerialInput),
        }
    }

    /// There is something to read: moves as much as fits into the input queue, and stops listening
    /// when it is full or the other side is gone.
    pub fn process_input(&mut self, events: &EventLoop) -> io::Result<()> {
        let mut buffer = [0; 4096];
        let room = self.input.room().min(buffer.len());
        if room == 0 {
            self.unwatch_input(events);
            return Ok(());
        }
        let read = match &self.place {
            Place::WriteOnly | Place::Socket { client: None, .. } => return Ok(()),
            Place::Terminal { input, .. } => (&*input).read(&mut buffer[..room]),
            Place::Pty { master, .. } => (&**master).read(&mut buffer[..room]),
            Place::Socket {
                client: Some(client),
                ..
            } => (&**client).read(&mut buffer[..room]),
        };
        match read {
            Ok(0) => self.end_of_input(events),
            Ok(count) => {
                self.input.push(&buffer[..count]);
                Ok(())
            }
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
                ) =>
            {
                Ok(())
            }
            Err(error) => {
                tracing::debug!(%error, "serial input ended");
                self.end_of_input(events)
            }
        }
    }

    /// The input queue has room again.
    pub fn process_room(&mut self, events: &EventLoop) -> io::Result<()> {
        // Only there to be reset; EAGAIN is as good.
        let _ = self.input.room_event().read();
        self.unwatch_input(events);
        self.watch_input(events)
    }

    /// A client knocks at the socket.
    pub fn process_listener(&mut self, events: &EventLoop) -> io::Result<()> {
        let Place::Socket { listener, client } = &mut self.place else {
            return Ok(());
        };
        let stream = match listener.accept() {
            Ok(Some(stream)) => stream,
            Ok(None) => return Ok(()),
            // As without descriptors to spare: no reason for the guest to end. It is tried again, later.
            Err(error) => {
                if let Some(suppressed) = NO_CLIENT.pass() {
                    tracing::warn!(%error, suppressed, "cannot take a client of the serial socket");
                }
                events.rest(listener, Token::SerialListener);
                return Ok(());
            }
        };
        stream.set_nonblocking(true)?;
        let stream = Arc::new(stream);
        // One client at a time: the next one waits in the backlog.
        events.remove(listener);
        *client = Some(Arc::clone(&stream));
        self.output.set_sink(Sink::Socket(stream));
        self.watch_input(events)
    }

    /// Gives a reader a last chance to take what is left.
    pub fn flush(&self) {
        self.output.flush_for(FLUSH_PATIENCE);
    }

    fn unwatch_input(&self, events: &EventLoop) {
        match &self.place {
            Place::WriteOnly | Place::Socket { client: None, .. } => {}
            Place::Terminal { input, .. } => events.remove(input),
            Place::Pty { master, .. } => events.remove(&**master),
            Place::Socket {
                client: Some(client),
                ..
            } => events.remove(&**client),
        }
    }

    fn end_of_input(&mut self, events: &EventLoop) -> io::Result<()> {
        self.unwatch_input(events);
        if let Place::Socket { listener, client } = &mut self.place {
            *client = None;
            self.output.set_sink(Sink::Nobody);
            events.add(listener, Token::SerialListener)?;
        }
        Ok(())
    }
}

impl Drop for SerialHost {
    fn drop(&mut self) {
        self.output.end();
    }
}

/// Makes a file, or opens what is there. A FIFO that nobody reads is an error (ENXIO) and not waited for: this
/// is the main thread. Later writes may wait, which the thread that makes them can.
fn create(path: &Path) -> io::Result<File> {
    let file = File::options()
        .write(true)
        .create(true)
        .truncate(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)?;
    set_flag(file.as_fd(), libc::F_SETFL, 0)?;
    Ok(file)
}

fn to(sink: Sink) -> Result<Output, Error> {
    Output::new(sink).map_err(Error::Setup)
}

fn open_terminal() -> Result<(Place, Output), Error> {
    let duplicate = |fd: io::Result<OwnedFd>| fd.map(File::from).map_err(Error::Setup);
    let input = duplicate(io::stdin().as_fd().try_clone_to_owned())?;
    let output = duplicate(io::stdout().as_fd().try_clone_to_owned())?;
    let raw = RawMode::enter(io::stdin().as_fd()).map_err(Error::Setup)?;
    let place = Place::Terminal { input, _raw: raw };
    Ok((place, to(Sink::File(Arc::new(output)))?))
}

fn open_pty() -> Result<(Place, Output), Error> {
    let (mut master, mut slave) = (-1, -1);
    let mut raw = std::mem::MaybeUninit::<libc::termios>::zeroed();
    // SAFETY: termios is plain integers, for which all zeroes is a value; cfmakeraw only changes it.
    let raw = unsafe {
        libc::cfmakeraw(raw.as_mut_ptr());
        raw.assume_init_mut().c_cflag |= libc::CS8 | libc::CREAD | libc::CLOCAL;
        raw.assume_init_ref()
    };
    // SAFETY: both fds are written on success; the name and window size may be null and the termios
    // lives through the call.
    let made = unsafe {
        libc::openpty(
            &raw mut master,
            &raw mut slave,
            std::ptr::null_mut(),
            raw,
            std::ptr::null(),
        )
    };
    if made < 0 {
        return Err(Error::Pty(io::Error::last_os_error()));
    }
    // SAFETY: openpty made both fds and nothing else owns them.
    let (master, slave) = unsafe { (File::from_raw_fd(master), OwnedFd::from_raw_fd(slave)) };
    for fd in [master.as_fd(), slave.as_fd()] {
        close_on_exec(fd).map_err(Error::Pty)?;
    }
    nonblocking(master.as_fd()).map_err(Error::Pty)?;
    let link = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&slave));
    let path = std::fs::read_link(link).map_err(Error::Pty)?;
    let master = Arc::new(master);
    let output = to(Sink::Pty(Arc::clone(&master)))?;
    let place = Place::Pty {
        master,
        _slave: slave,
        path,
    };
    Ok((place, output))
}

fn close_on_exec(fd: std::os::fd::BorrowedFd<'_>) -> io::Result<()> {
    set_flag(fd, libc::F_SETFD, libc::FD_CLOEXEC)
}

fn nonblocking(fd: std::os::fd::BorrowedFd<'_>) -> io::Result<()> {
    set_flag(fd, libc::F_SETFL, libc::O_NONBLOCK | libc::O_RDWR)
}

fn set_flag(fd: std::os::fd::BorrowedFd<'_>, command: i32, flags: i32) -> io::Result<()> {
    // SAFETY: both commands take an int and touch no memory.
    if unsafe { libc::fcntl(std::os::fd::AsRawFd::as_raw_fd(&fd), command, flags) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;
    use vmm_sys_util::tempdir::TempDir;

    #[test]
    fn clients_of_a_socket_come_and_go() {
        let dir = TempDir::new().unwrap();
        let path = dir.as_path().join("serial");
        let events = EventLoop::new().unwrap();
        let mut host = SerialHost::open(&SerialConfig::Socket(path.clone())).unwrap();
        host.watch(&events).unwrap();
        for round in 0..3u8 {
            let mut client = UnixStream::connect(&path).unwrap();
            assert_eq!(events.wait().unwrap(), [Token::SerialListener]);
            host.process_listener(&events).unwrap();

            host.output().write_all(&[round]).unwrap();
            let mut byte = [0];
            client.read_exact(&mut byte).unwrap();
            assert_eq!(byte, [round]);

            client.write_all(b"in").unwrap();
            assert_eq!(events.wait().unwrap(), [Token::SerialInput]);
            let before = host.input.room();
            host.process_input(&events).unwrap();
            assert_eq!(before - host.input.room(), 2);

            drop(client);
            assert_eq!(events.wait().unwrap(), [Token::SerialInput]);
            host.process_input(&events).unwrap();
        }
    }

    #[test]
    fn a_pty_has_a_name_and_carries_bytes_both_ways() {
        let events = EventLoop::new().unwrap();
        let mut host = SerialHost::open(&SerialConfig::Pty).unwrap();
        host.watch(&events).unwrap();
        let path = host.pty_path().unwrap().to_owned();
        let mut other = File::options().read(true).write(true).open(path).unwrap();
        host.output().write_all(b"out\n").unwrap();
        let mut bytes = [0; 4];
        other.read_exact(&mut bytes).unwrap();
        assert_eq!(&bytes, b"out\n");
        other.write_all(b"in\r").unwrap();
        assert_eq!(events.wait().unwrap(), [Token::SerialInput]);
        host.process_input(&events).unwrap();
        assert_eq!(host.input.room(), super::super::port::INPUT_CAPACITY - 3);
    }

    #[test]
    fn a_fifo_is_written_where_somebody_reads_it_and_waited_for_nowhere() {
        let dir = TempDir::new().unwrap();
        let path = dir.as_path().join("fifo");
        let name = std::ffi::CString::new(path.as_os_str().as_encoded_bytes()).unwrap();
        // SAFETY: the name is a string that outlives the call.
        assert_eq!(unsafe { libc::mkfifo(name.as_ptr(), 0o600) }, 0);
        let config = SerialConfig::File(path.clone());
        let error = SerialHost::open(&config).err().unwrap();
        let source = std::error::Error::source(&error).unwrap().to_string();
        assert!(source.contains("os error 6"), "{source}");

        let mut options = File::options();
        options.read(true).custom_flags(libc::O_NONBLOCK);
        let mut reader = options.open(&path).unwrap();
        let host = SerialHost::open(&config).unwrap();
        host.output().write_all(b"out").unwrap();
        host.output().flush_for(Duration::from_secs(60));
        let mut bytes = [0; 3];
        reader.read_exact(&mut bytes).unwrap();
        assert_eq!(&bytes, b"out");
    }

    #[test]
    fn a_file_that_cannot_be_made_is_named() {
        let config = SerialConfig::File("/nowhere/serial.log".into());
        let error = SerialHost::open(&config).err().unwrap();
        assert_eq!(
            error.to_string(),
            "cannot create the serial file /nowhere/serial.log"
        );
    }
}
