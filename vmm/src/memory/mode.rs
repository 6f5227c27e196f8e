//! From what was asked of guest memory, and the devices there are, to how it is made. Pure.
//!
//! | `shared=` | `mergeable=` | devices of other processes | mode |
//! |---|---|---|---|
//! | – or on | off | any | shared |
//! | off | off | none | private |
//! | – or off | on | none | private |
//! | – or off | on | some | window, or shared where the guest is no bigger than one |
//! | off | off | some | private, and shadow queues |
//! | on | on | any | never |
//!
//! Devices with `dma=shadow` do not count: they need no memory of the guest's.
//!
//! KSM merges anonymous private memory; vhost-user needs memory that a file descriptor stands for. The window is
//! how a guest has both, and shadow queues are how it has private memory alone ([`crate::vhost_user`]).

#![forbid(unsafe_code)]

use super::layout::LOW_RAM_END;
use crate::config::{Dma, MemoryConfig, Mergeable, VmConfig};
use crate::vhost_user::Kind;

/// How guest RAM is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// One memfd, mapped shared: backends map all of it.
    Shared,
    /// Anonymous: no other process sees it.
    Private,
    /// `[0, len)` a memfd that backends map, the rest anonymous, from 4 GiB on.
    Window {
        /// Bytes of the window.
        len: u64,
    },
}

/// Least window: Linux's bounce buffers take 64 MiB of it, and a kernel with a smaller one was seen to stop.
const MIN_WINDOW: u64 = 128 << 20;
/// A window's unit: huge pages fit on both sides of its end.
const WINDOW_UNIT: u64 = 2 << 20;
/// Guests up to this size have the least window.
const SMALL_GUEST: u64 = 1 << 30;
/// With more queues than this a window is twice as big: each has rings and buffers in it.
const MANY_QUEUES: usize = 16;

/// Words that do not go together (exit code 1).
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ModeError {
    /// Both on.
    #[error(
        "--memory: shared=on and mergeable=on exclude each other, as only private memory is merged; leave shared= \
         out (vhost-user devices get a DMA window) or use mergeable=off"
    )]
    SharedMergeable,
    /// KSM knows small pages only.
    #[error(
        "--memory: hugepages=on and mergeable=on exclude each other, as only small pages are merged; use \
         hugepages=off (thp=on keeps transparent huge pages) or mergeable=off"
    )]
    HugeMergeable,
    /// A device asks for a window that there is not.
    #[error("{device}: dma=window is for --memory mergeable=on")]
    NoWindow {
        /// Its name.
        device: String,
    },
    /// A window for nothing.
    #[error("--memory: window= is for mergeable=on")]
    WindowUnused,
    /// Not a possible window.
    #[error("--memory: window={len} bytes must be a multiple of 2 MiB from 128 MiB to 3 GiB")]
    BadWindow {
        /// As asked.
        len: u64,
    },
    /// Nothing outside the window.
    #[error("--memory: window={len} bytes leaves nothing of size={size_bytes} bytes to merge")]
    WindowTooBig {
        /// As asked.
        len: u64,
        /// All RAM.
        size_bytes: u64,
    },
    /// Not whole huge pages.
    #[error("--memory: size={size_bytes} bytes is not a multiple of hugepage_size={page} bytes")]
    OddHugePages {
        /// All RAM.
        size_bytes: u64,
        /// Bytes of a page.
        page: u64,
    },
}

impl Mode {
    /// The mode of a guest.
    ///
    /// # Errors
    /// Where its words exclude each other, or what they need is not built.
    pub fn of(config: &VmConfig) -> Result<Self, ModeError> {
        let memory = &config.memory;
        check_huge_pages(memory)?;
        if let Some(len) = memory.window_bytes {
            if memory.mergeable == Mergeable::Off {
                return Err(ModeError::WindowUnused);
            }
            let possible = (MIN_WINDOW..=LOW_RAM_END).contains(&len);
            if !possible || !len.is_multiple_of(WINDOW_UNIT) {
                return Err(ModeError::BadWindow { len });
            }
        }
        let mut devices = Kind::all(config);
        if memory.mergeable == Mergeable::Off
            && let Some(kind) = devices.find(|kind| kind.dma() == Dma::Window)
        {
            let device = kind.id().to_owned();
            return Err(ModeError::NoWindow { device });
        }
        let external = queues(config);
        match (memory.shared, memory.mergeable, external) {
            (Some(true), Mergeable::Eligible | Mergeable::Always, _) => {
                Err(ModeError::SharedMergeable)
            }
            (Some(true) | None, Mergeable::Off, _) => Ok(Self::Shared),
            (Some(false), Mergeable::Off, _) | (_, _, 0) => Ok(Self::Private),
            (_, _, queues) => Self::window(memory, queues),
        }
    }

    fn window(memory: &MemoryConfig, queues: usize) -> Result<Self, ModeError> {
        let size_bytes = memory.size_bytes;
        match memory.window_bytes {
            Some(len) if len >= size_bytes => Err(ModeError::WindowTooBig { len, size_bytes }),
            Some(len) => Ok(Self::Window { len }),
            None => match default_window(size_bytes, queues) {
                len if len >= size_bytes => Ok(Self::Shared),
                len => Ok(Self::Window { len }),
            },
        }
    }

    /// RAM below the PCI hole and from 4 GiB on, in bytes.
    pub const fn split(self, size_bytes: u64) -> (u64, u64) {
        match self {
            Self::Window { len } if len < size_bytes => (len, size_bytes - len),
            _ => super::layout::ram_split(size_bytes),
        }
    }
}

/// The window of a guest that did not ask for another.
fn default_window(size_bytes: u64, queues: usize) -> u64 {
    let by_size = if size_bytes <= SMALL_GUEST {
        MIN_WINDOW
    } else {
        2 * MIN_WINDOW
    };
    if queues > MANY_QUEUES {
        2 * by_size
    } else {
        by_size
    }
}

fn check_huge_pages(memory: &MemoryConfig) -> Result<(), ModeError> {
    let Some(pages) = memory.huge_pages else {
        return Ok(());
    };
    if memory.mergeable != Mergeable::Off {
        return Err(ModeError::HugeMergeable);
    }
    let (size_bytes, page) = (memory.size_bytes, pages.bytes());
    if !size_bytes.is_multiple_of(page) {
        return Err(ModeError::OddHugePages { size_bytes, page });
    }
    Ok(())
}

/// Queues of devices that other processes serve and that could use a window.
fn queues(config: &VmConfig) -> usize {
    let devices = Kind::all(config).filter(|kind| kind.dma() != Dma::Shadow);
    devices
        .map(|kind| usize::from(kind.configured_queues().max(1)))
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{convert, device_flags, testing};

    const MIB: u64 = 1 << 20;

    fn mode(memory: &str, disks: &[&str]) -> Result<Mode, String> {
        let mut config = testing::config();
        config.memory = convert::memory(memory).unwrap();
        let disks = disks.iter().enumerate();
        config.disks = disks
            .map(|(index, text)| device_flags::disk(text, index).unwrap())
            .collect();
        Mode::of(&config).map_err(|error| error.to_string())
    }

    #[test]
    fn the_table_is_kept() {
        let window = Mode::Window { len: 256 * MIB };
        let (none, disk) = (&[][..], &["socket=/d"][..]);
        for (text, without, with) in [
            ("2G", Ok(Mode::Shared), Ok(Mode::Shared)),
            ("2G,shared=on", Ok(Mode::Shared), Ok(Mode::Shared)),
            ("2G,shared=off", Ok(Mode::Private), Ok(Mode::Private)),
            ("2G,mergeable=on", Ok(Mode::Private), Ok(window)),
            ("2G,mergeable=always", Ok(Mode::Private), Ok(window)),
            ("2G,shared=off,mergeable=on", Ok(Mode::Private), Ok(window)),
            (
                "2G,shared=on,mergeable=on",
                Err("leave shared="),
                Err("mergeable=off"),
            ),
            (
                "2G,hugepages=on,mergeable=on",
                Err("hugepages=off"),
                Err("mergeable=off"),
            ),
            ("2G,hugepages=on", Ok(Mode::Shared), Ok(Mode::Shared)),
            (
                "2G,hugepages=on,shared=off",
                Ok(Mode::Private),
                Ok(Mode::Private),
            ),
        ] {
            for (disks, expected) in [(none, without), (disk, with)] {
                match (mode(text, disks), expected) {
                    (Ok(mode), Ok(expected)) => assert_eq!(mode, expected, "{text}"),
                    (Err(line), Err(part)) => {
                        assert!(
                            line.contains(part) && !line.contains('\n'),
                            "{text}: {line}"
                        );
                    }
                    (got, expected) => panic!("{text} {disks:?}: {got:?}, not {expected:?}"),
                }
            }
        }
    }

    #[test]
    fn devices_with_shadow_queues_need_no_memory_of_the_guests() {
        let (shadow, window) = ("socket=/a,dma=shadow", "socket=/b,dma=window");
        let private = "2G,mergeable=on";
        assert_eq!(mode(private, &[shadow]), Ok(Mode::Private));
        let both = Ok(Mode::Window { len: 256 * MIB });
        assert_eq!(mode(private, &[shadow, window]), both);
        assert_eq!(mode("2G", &[shadow]), Ok(Mode::Shared));
        for memory in ["2G", "2G,shared=off"] {
            let line = mode(memory, &[shadow, window]).unwrap_err();
            assert_eq!(line, "_disk1: dma=window is for --memory mergeable=on");
        }
    }

    #[test]
    fn a_window_grows_with_the_guest_and_its_queues() {
        let len = |memory: &str, disk: &str| match mode(memory, &[disk]) {
            Ok(Mode::Window { len }) => len / MIB,
            other => panic!("{other:?}"),
        };
        assert_eq!(len("1G,mergeable=on", "socket=/d"), 128);
        assert_eq!(len("4G,mergeable=on", "socket=/d"), 256);
        assert_eq!(len("4G,mergeable=on", "socket=/d,num_queues=32"), 512);
        assert_eq!(len("4G,mergeable=on,window=200M", "socket=/d"), 200);
    }

    #[test]
    fn a_guest_no_bigger_than_a_window_is_all_window() {
        let disk = &["socket=/d"][..];
        assert_eq!(mode("128M,mergeable=on", disk), Ok(Mode::Shared));
        assert_eq!(
            mode("130M,mergeable=on", disk),
            Ok(Mode::Window { len: 128 * MIB })
        );
        let line = mode("256M,mergeable=on,window=256M", disk).unwrap_err();
        assert!(line.contains("leaves nothing"), "{line}");
    }

    #[test]
    fn windows_that_cannot_be_are_refused() {
        for window in ["64M", "129M", "4G"] {
            let line = mode(&format!("8G,mergeable=on,window={window}"), &[]).unwrap_err();
            assert!(line.contains("from 128 MiB to 3 GiB"), "{line}");
        }
        let line = mode("8G,window=256M", &[]).unwrap_err();
        assert!(line.contains("is for mergeable=on"), "{line}");
        let line = mode("1026M,hugepages=on,hugepage_size=1G", &[]).unwrap_err();
        assert!(line.contains("not a multiple of hugepage_size"), "{line}");
    }

    #[test]
    fn ram_outside_the_window_begins_at_4_gib() {
        let window = Mode::Window { len: 128 * MIB };
        assert_eq!(window.split(1 << 30), (128 * MIB, 896 * MIB));
        assert_eq!(Mode::Shared.split(1 << 30), (1 << 30, 0));
        assert_eq!(Mode::Private.split(5 << 30), (3 << 30, 2 << 30));
    }
}
