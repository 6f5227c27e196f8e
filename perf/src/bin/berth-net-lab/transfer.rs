//! One transfer: a fixed number of bytes over a TCP connection that the guest makes.
//!
//! The host accepts, says go, and its clock runs from there until all bytes have arrived: those it reads,
//! or those whose arrival the guest acknowledges with one byte. So neither a program's start nor the
//! connection's counts.

use std::fmt;
use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use berth_tests_framework::wait::{seconds, until};
use clap::ValueEnum;

/// Bytes of one read or write, at most.
const CHUNK: usize = 128 << 10;
/// How long one read or write may take.
const STALL: Duration = seconds(120);

/// Which way the bytes go.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Direction {
    /// The guest sends
    ToHost,
    /// The guest receives
    ToGuest,
}

impl Direction {
    pub(crate) const ALL: [Self; 2] = [Self::ToHost, Self::ToGuest];

    /// As the command line takes it.
    pub(crate) const fn word(self) -> &'static str {
        match self {
            Self::ToHost => "to-host",
            Self::ToGuest => "to-guest",
        }
    }
}

impl fmt::Display for Direction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::ToHost => "guest to host",
            Self::ToGuest => "host to guest",
        })
    }
}

/// The guest's end.
///
/// # Errors
/// The connection fails, or ends early.
pub(crate) fn guest_end(direction: Direction, host: SocketAddr, bytes: u64) -> Result<()> {
    let mut stream = TcpStream::connect(host).with_context(|| host.to_string())?;
    stream.read_exact(&mut [0]).context("no go from the host")?;
    match direction {
        Direction::ToHost => send(&mut stream, bytes),
        Direction::ToGuest => {
            receive(&mut stream, bytes)?;
            stream.write_all(&[1]).context("acknowledge")
        }
    }
}

/// The host's end: what a transfer to the guest that will connect takes.
///
/// # Errors
/// Nobody connects, the connection stalls, or ends early.
pub(crate) fn host_end(
    direction: Direction,
    listener: &TcpListener,
    bytes: u64,
) -> Result<Duration> {
    listener.set_nonblocking(true)?;
    let mut stream = until("the guest's connection", seconds(60), || {
        match listener.accept() {
            Ok((stream, _)) => Ok(Some(stream)),
            Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(None),
            Err(error) => Err(error.into()),
        }
    })?;
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(STALL))?;
    stream.set_write_timeout(Some(STALL))?;
    let start = Instant::now();
    stream.write_all(&[1])?;
    match direction {
        Direction::ToHost => receive(&mut stream, bytes)?,
        Direction::ToGuest => {
            send(&mut stream, bytes)?;
            stream
                .read_exact(&mut [0])
                .context("no acknowledgement from the guest")?;
        }
    }
    Ok(start.elapsed())
}

fn send(stream: &mut TcpStream, bytes: u64) -> Result<()> {
    let chunk = vec![0x5a; CHUNK];
    let mut left = bytes;
    while left > 0 {
        let count = left.min(CHUNK as u64);
        stream
            .write_all(&chunk[..usize::try_from(count)?])
            .with_context(|| format!("{left} of {bytes} bytes left to send"))?;
        left -= count;
    }
    Ok(())
}

fn receive(stream: &mut TcpStream, bytes: u64) -> Result<()> {
    let mut chunk = vec![0; CHUNK];
    let mut left = bytes;
    while left > 0 {
        let most = usize::try_from(left.min(CHUNK as u64))?;
        let count = stream
            .read(&mut chunk[..most])
            .with_context(|| format!("{left} of {bytes} bytes left to receive"))?;
        ensure!(count > 0, "the connection ended {left} bytes early");
        left -= count as u64;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_go_either_way_and_an_early_end_is_an_error() {
        for direction in Direction::ALL {
            for (guest, well) in [(1 << 20, true), ((1 << 20) - 1, false)] {
                let listener = TcpListener::bind("127.0.0.1:0").expect("a listener");
                let address = listener.local_addr().expect("its address");
                let end = std::thread::spawn(move || guest_end(direction, address, guest));
                let host = host_end(direction, &listener, 1 << 20);
                let guest = end.join().expect("no panic");
                let both = host.is_ok() && guest.is_ok();
                // A guest that takes a byte less acknowledges all the same: the host cannot tell.
                let expected = well || direction == Direction::ToGuest;
                assert_eq!(both, expected, "{direction}: {host:?}, {guest:?}");
            }
        }
    }
}
