//! Frames for the guest that the host dropped because the tap's queue was full: what a network card
//! counts as missed.
//!
//! The kernel counts them as the interface's transmit drops. Read from /proc/net/dev, opened with
//! the tap, before the sandbox closes; each look reads it anew. Threads: any.
//!
//! Kernel: `man 5 proc_net`, /proc/net/dev.

#![forbid(unsafe_code)]

use std::fs::File;
use std::io::{self, Read as _, Seek as _};
use std::sync::{Mutex, PoisonError};

const PATH: &str = "/proc/net/dev";
/// Which number of an interface's line it is: eight of the receive direction come first.
const TX_DROP: usize = 8 + 3;

/// The count of one interface.
#[derive(Debug)]
pub(super) struct Drops {
    name: String,
    /// A look is a seek and a read, which belong together.
    file: Mutex<File>,
    /// What the interface had dropped before.
    before: u64,
}

impl Drops {
    /// Counts drops of the interface `name` from now on.
    ///
    /// # Errors
    /// The file cannot be read, or does not have the interface.
    pub(super) fn open(name: &str) -> io::Result<Self> {
        let mut drops = Self {
            name: name.to_owned(),
            file: Mutex::new(File::open(PATH)?),
            before: 0,
        };
        drops.before = drops.count()?;
        Ok(drops)
    }

    /// Drops until now.
    ///
    /// # Errors
    /// The interface has gone.
    pub(super) fn count(&self) -> io::Result<u64> {
        let mut text = String::new();
        {
            let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
            file.rewind()?;
            file.read_to_string(&mut text)?;
        }
        let count = tx_drops(&text, &self.name).ok_or(io::ErrorKind::NotFound)?;
        Ok(count.saturating_sub(self.before))
    }
}

fn tx_drops(text: &str, name: &str) -> Option<u64> {
    let numbers = text.lines().find_map(|line| {
        let (interface, numbers) = line.split_once(':')?;
        (interface.trim() == name).then_some(numbers)
    })?;
    numbers.split_whitespace().nth(TX_DROP)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_number_of_the_right_interface() {
        let text = "\
Inter-|   Receive                                                |  Transmit
 face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop fifo colls carrier compressed
    lo:     100       1    0    0    0     0          0         0      100       1    0    0    0     0       0          0
 xtap0:       1       2    3    4    5     6          7         8        9      10   11   12   13    14      15         16
  tap0:       1       2    3    4    5     6          7         8        9      10   11   99   13    14      15         16
";
        assert_eq!(tx_drops(text, "tap0"), Some(99));
        assert_eq!(tx_drops(text, "xtap0"), Some(12));
        assert_eq!(tx_drops(text, "tap"), None);
        assert_eq!(tx_drops("tap0: 1 2 3", "tap0"), None);
    }
}
