//! Taps, a page server and client, and a frame counter, all in the story's network namespace.
//!
//! Sockets are made on the story's thread, which fixes their namespace, and served by helper threads.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::process::run;
use crate::sys;

/// Makes a tap of one queue, so one that a daemon attaches to without IFF_MULTI_QUEUE.
///
/// # Errors
/// `ip` refuses.
pub fn make_tap(name: &str) -> Result<()> {
    run(
        "ip",
        &["tuntap", "add", "dev", name, "mode", "tap", "vnet_hdr"],
    )
    .map(drop)
}

/// Gives an interface an address of a /24 and brings it up.
///
/// # Errors
/// `ip` refuses.
pub fn bring_up(name: &str, address: Ipv4Addr) -> Result<()> {
    run(
        "ip",
        &["addr", "add", &format!("{address}/24"), "dev", name],
    )?;
    run("ip", &["link", "set", name, "up"]).map(drop)
}

/// Serves one file to every client that asks for anything by HTTP.
#[derive(Debug)]
pub struct PageServer {
    address: SocketAddr,
    stop: Arc<AtomicBool>,
    served: Arc<AtomicU64>,
}

impl PageServer {
    /// Serves `file` on `address` and a port of its own.
    ///
    /// # Errors
    /// The address is not ours.
    pub fn start(address: Ipv4Addr, file: &Path) -> Result<Self> {
        let listener =
            TcpListener::bind((address, 0)).with_context(|| format!("bind {address}"))?;
        let server = Self {
            address: listener.local_addr()?,
            stop: Arc::default(),
            served: Arc::default(),
        };
        let (stop, served) = (Arc::clone(&server.stop), Arc::clone(&server.served));
        let file = file.to_owned();
        std::thread::Builder::new()
            .name("page".to_owned())
            .spawn(move || {
                for client in listener.incoming() {
                    if stop.load(Ordering::Relaxed) {
                        return;
                    }
                    if let Ok(client) = client
                        && serve_file(client, &file).is_ok()
                    {
                        served.fetch_add(1, Ordering::Relaxed);
                    }
                }
            })?;
        Ok(server)
    }

    /// `http://address:port/page`.
    #[must_use]
    pub fn url(&self) -> String {
        format!("http://{}/page", self.address)
    }

    /// Whole answers sent.
    #[must_use]
    pub fn served(&self) -> u64 {
        self.served.load(Ordering::Relaxed)
    }
}

impl Drop for PageServer {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        // Wakes the thread, which looks at `stop`; works from any namespace only where it was made.
        let _ = TcpStream::connect_timeout(&self.address, Duration::from_secs(1));
    }
}

fn serve_file(client: TcpStream, path: &Path) -> Result<()> {
    client.set_read_timeout(Some(Duration::from_secs(30)))?;
    client.set_write_timeout(Some(Duration::from_secs(60)))?;
    let mut reader = BufReader::new(client.try_clone()?);
    let mut line = String::new();
    while reader.read_line(&mut line)? > 0 && !line.trim_end().is_empty() {
        line.clear();
    }
    let mut file = File::open(path)?;
    let length = file.metadata()?.len();
    let mut client = client;
    write!(
        client,
        "HTTP/1.0 200 OK\r\nContent-Length: {length}\r\nContent-Type: text/plain\r\n\r\n"
    )?;
    std::io::copy(&mut file, &mut client)?;
    Ok(())
}

/// GET from a server in the guest, into a file; bytes of the body.
///
/// # Errors
/// No whole answer in time.
pub fn fetch(address: SocketAddr, path: &str, to: &Path, limit: Duration) -> Result<u64> {
    let limit = crate::wait::patient(limit);
    let mut stream = TcpStream::connect_timeout(&address, limit)
        .with_context(|| format!("connect to {address}"))?;
    stream.set_read_timeout(Some(limit))?;
    write!(stream, "GET {path} HTTP/1.0\r\nHost: guest\r\n\r\n")?;
    let mut reader = BufReader::with_capacity(1 << 16, stream);
    let mut line = String::new();
    reader.read_line(&mut line)?;
    let status = line.split_whitespace().nth(1).unwrap_or_default();
    anyhow::ensure!(status == "200", "{address} answers: {line:?}");
    while reader.read_line(&mut line)? > 0 && !line.ends_with("\n\r\n") {}
    Ok(std::io::copy(&mut reader, &mut File::create(to)?)?)
}

/// Waits until frames can be sent through an interface: its carrier is there, and the kernel has noticed.
///
/// # Errors
/// It does not come up in time.
pub fn wait_up(name: &str, limit: Duration) -> Result<()> {
    crate::wait::until(&format!("{name} to be up"), limit, || {
        let link = run("ip", &["-o", "link", "show", "dev", name])?;
        Ok(link.contains("state UP").then_some(()))
    })
}

/// Sends and receives whole frames on an interface.
#[derive(Debug)]
pub struct FrameSocket(OwnedFd);

impl FrameSocket {
    /// On `interface`, in this thread's network namespace.
    ///
    /// # Errors
    /// There is no such interface.
    pub fn open(interface: &str) -> Result<Self> {
        Self::with(interface, None)
    }

    /// The same for frames of one type that come in: other traffic cannot fill its buffer.
    ///
    /// # Errors
    /// There is no such interface.
    pub fn of_type(interface: &str, ethertype: u16) -> Result<Self> {
        Self::with(interface, Some(ethertype))
    }

    fn with(interface: &str, ethertype: Option<u16>) -> Result<Self> {
        let socket = sys::packet_socket(interface, ethertype);
        Ok(Self(socket.with_context(|| {
            format!("packet socket on {interface}")
        })?))
    }

    /// Hands a frame to the interface, as if this host sent it.
    ///
    /// # Errors
    /// The interface is down, or its queue full.
    pub fn send(&self, frame: &[u8]) -> Result<()> {
        sys::send_frame(&self.0, frame).context("send a frame")
    }

    /// The next frame that came in from the interface; none when there is none within `limit`.
    ///
    /// # Errors
    /// The socket's own.
    pub fn receive<'a>(&self, buffer: &'a mut [u8], limit: Duration) -> Result<Option<&'a [u8]>> {
        loop {
            match sys::receive_frame(&self.0, buffer, limit)? {
                None => return Ok(None),
                // What this host sends is not asked for.
                Some((_, true)) => {}
                Some((length, false)) => return Ok(Some(&buffer[..length.min(buffer.len())])),
            }
        }
    }
}

/// Frames seen on an interface, by direction.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Frames {
    /// From the host to the guest.
    pub to_guest: u64,
    /// Longest of them, in bytes.
    pub to_guest_longest: usize,
    /// From the guest to the host.
    pub from_guest: u64,
    /// Longest of them, in bytes.
    pub from_guest_longest: usize,
}

/// Counts the frames of an interface with a packet socket.
#[derive(Debug)]
pub struct FrameCounter {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<std::io::Result<Frames>>>,
}

impl FrameCounter {
    /// Counts from now on.
    ///
    /// # Errors
    /// There is no such interface.
    pub fn start(interface: &str) -> Result<Self> {
        let socket = sys::packet_socket(interface, None)
            .with_context(|| format!("packet socket on {interface}"))?;
        let stop = Arc::new(AtomicBool::new(false));
        let seen = Arc::clone(&stop);
        let thread = std::thread::Builder::new()
            .name("frames".to_owned())
            .spawn(move || count_frames(&socket, &seen))?;
        Ok(Self {
            stop,
            thread: Some(thread),
        })
    }

    /// Ends the count.
    ///
    /// # Errors
    /// The socket failed.
    pub fn finish(mut self) -> Result<Frames> {
        self.stop.store(true, Ordering::Relaxed);
        let thread = self.thread.take().context("finished already")?;
        Ok(thread
            .join()
            .map_err(|_| anyhow::anyhow!("frame counter panicked"))??)
    }
}

impl Drop for FrameCounter {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

fn count_frames(socket: &OwnedFd, stop: &AtomicBool) -> std::io::Result<Frames> {
    let mut frames = Frames::default();
    // Reads the queue empty before it looks at `stop`, so that nothing seen is lost.
    loop {
        match sys::receive_frame(socket, &mut [0], Duration::from_millis(50))? {
            Some((length, true)) => {
                frames.to_guest += 1;
                frames.to_guest_longest = frames.to_guest_longest.max(length);
            }
            Some((length, false)) => {
                frames.from_guest += 1;
                frames.from_guest_longest = frames.from_guest_longest.max(length);
            }
            None if stop.load(Ordering::Relaxed) => return Ok(frames),
            None => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::TempPath;

    #[test]
    fn a_page_is_fetched_whole() {
        let path = TempPath::new("page");
        std::fs::write(&*path, b"a page").expect("written");
        let server = PageServer::start(Ipv4Addr::LOCALHOST, &path).expect("a server");
        let limit = Duration::from_secs(20);
        let copy = TempPath::new("copy");
        let size = fetch(server.address, "/page", &copy, limit).expect("a page");
        assert_eq!(size, 6);
        assert_eq!(std::fs::read(&*copy).expect("a copy"), b"a page");
    }
}
