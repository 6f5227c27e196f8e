//! What the kernel counts of a vCPU: KVM_GET_STATS_FD's binary statistics.
//!
//! ```text
//!   header ── id string ── descriptors (num_desc, each with a name of name_size bytes) ── values
//! ```
//!
//! Reference: KVM api.rst, "KVM_GET_STATS_FD". Histograms are left out; everything else has one value.
#![expect(unsafe_code, reason = "the ioctl has no wrapper")]

use std::fs::File;
use std::io::{self, Error, ErrorKind};
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::FileExt;

use kvm_ioctls::VcpuFd;

/// `_IO(KVMIO, 0xce)`.
const KVM_GET_STATS_FD: libc::Ioctl = 0xaece;
const HEADER_LEN: usize = 24;
/// Length of a descriptor before its name.
const DESC_LEN: usize = 16;
/// More descriptors than any kernel has.
const MAX_DESCS: usize = 4096;
/// Bits of a descriptor's flags that say what kind of value it has.
const TYPE_MASK: u32 = 0xf;
/// Kinds with one value: cumulative, instant, peak.
const LAST_SINGLE_TYPE: u32 = 2;

/// The statistics file of a vCPU and where each value stands in it.
#[derive(Debug)]
pub(super) struct KernelStats {
    file: File,
    values: Vec<(String, u64)>,
}

impl KernelStats {
    /// Opens and reads the descriptors, which never change.
    pub(super) fn open(vcpu: &VcpuFd) -> io::Result<Self> {
        // SAFETY: the ioctl takes no argument and returns a new fd or -1.
        let fd = unsafe { libc::ioctl(vcpu.as_raw_fd(), KVM_GET_STATS_FD, 0) };
        if fd < 0 {
            return Err(Error::last_os_error());
        }
        // SAFETY: the kernel just made the fd for us.
        let file = unsafe { File::from_raw_fd(fd) };
        let values = descriptors(|buffer, at| file.read_exact_at(buffer, at))?;
        Ok(Self { file, values })
    }

    /// Names and values now, `kvm_` before the kernel's names.
    pub(super) fn read(&self) -> io::Result<Vec<(String, u64)>> {
        self.values
            .iter()
            .map(|(name, at)| {
                let mut value = [0; 8];
                self.file.read_exact_at(&mut value, *at)?;
                Ok((name.clone(), u64::from_ne_bytes(value)))
            })
            .collect()
    }
}

fn descriptors(read: impl Fn(&mut [u8], u64) -> io::Result<()>) -> io::Result<Vec<(String, u64)>> {
    let bad = || Error::from(ErrorKind::InvalidData);
    let mut header = [0; HEADER_LEN];
    read(&mut header, 0)?;
    let [_flags, name_size, count, _id, descs_at, data_at] = words(&header);
    let (name_size, count) = (name_size as usize, count as usize);
    if name_size > 256 || count > MAX_DESCS {
        return Err(bad());
    }
    let mut values = Vec::new();
    let mut desc = vec![0; DESC_LEN + name_size];
    for index in 0..count {
        let at = u64::from(descs_at) + (index * desc.len()) as u64;
        read(&mut desc, at)?;
        let (fixed, name) = desc.split_at(DESC_LEN);
        let [flags, _exponent_and_size, offset, _bucket] =
            words::<DESC_LEN, 4>(fixed.try_into().map_err(|_| bad())?);
        let name = name.split(|byte| *byte == 0).next().unwrap_or_default();
        let name = std::str::from_utf8(name).map_err(|_| bad())?;
        if flags & TYPE_MASK <= LAST_SINGLE_TYPE {
            values.push((
                format!("kvm_{name}"),
                u64::from(data_at) + u64::from(offset),
            ));
        }
    }
    Ok(values)
}

fn words<const BYTES: usize, const WORDS: usize>(bytes: &[u8; BYTES]) -> [u32; WORDS] {
    std::array::from_fn(|index| {
        let at = index * 4;
        u32::from_ne_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(name_size: u32, descs: &[(u32, u32, &str)]) -> Vec<u8> {
        let count = descs.len() as u32;
        let descs_at = 24 + 48;
        let data_at = descs_at + count * (16 + name_size);
        let mut bytes = Vec::new();
        for word in [0, name_size, count, 24, descs_at, data_at] {
            bytes.extend(word.to_ne_bytes());
        }
        bytes.resize(descs_at as usize, 0);
        for (flags, offset, name) in descs {
            for word in [*flags, 1 << 16, *offset, 0] {
                bytes.extend(word.to_ne_bytes());
            }
            let end = bytes.len() + name_size as usize;
            bytes.extend(name.as_bytes());
            bytes.resize(end, 0);
        }
        bytes
    }

    fn parse(bytes: &[u8]) -> io::Result<Vec<(String, u64)>> {
        descriptors(|buffer, at| {
            let start = at as usize;
            let source = bytes.get(start..start + buffer.len());
            buffer.copy_from_slice(source.ok_or(ErrorKind::UnexpectedEof)?);
            Ok(())
        })
    }

    #[test]
    fn single_values_are_found_and_histograms_left_out() {
        let bytes = file(
            48,
            &[
                (0, 0, "exits"),
                (4, 8, "halt_wait_hist"),
                (0x11, 264, "io_exits"),
            ],
        );
        let data_at = bytes.len() as u64;
        assert_eq!(
            parse(&bytes).unwrap(),
            [
                ("kvm_exits".to_owned(), data_at),
                ("kvm_io_exits".to_owned(), data_at + 264)
            ]
        );
    }

    #[test]
    fn a_file_that_ends_early_is_an_error() {
        let bytes = file(48, &[(0, 0, "exits")]);
        for len in 0..bytes.len() {
            if !(24..24 + 48).contains(&len) {
                assert!(parse(&bytes[..len]).is_err(), "{len}");
            }
        }
    }
}
