//! The VMM's API as far as a tuner asks: `vmm.ping`, `vm.info`, `vm.memory-sample`, `vm.memory-advice`.
//!
//! One thread, one request a connection. Its CPU time is the tuner's: nobody else asks.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use berth_vmm_api_types::v1 as wire;
use serde_json::json;

use super::hashes;
use super::region::{Advice, Region};

/// The trust domain of all holders.
pub(crate) const DOMAIN: &str = "berth-perf";
/// Longest body.
const MOST_BYTES: u64 = 1 << 20;

/// What is asked about.
#[derive(Debug)]
pub(super) struct Api {
    pub(super) region: std::sync::Arc<Region>,
    /// One flag a page.
    pub(super) offered: Mutex<Vec<bool>>,
}

const PAGE: u64 = 4096;

impl Api {
    /// Serves until the process ends.
    pub(super) fn serve(&self, listener: &UnixListener) {
        for stream in listener.incoming().flatten() {
            // A client that hangs up is its own business.
            let _ = self.answer(stream);
        }
    }

    fn answer(&self, stream: UnixStream) -> Result<()> {
        stream.set_read_timeout(Some(Duration::from_secs(10)))?;
        let mut reader = BufReader::new(stream.try_clone()?);
        let mut line = String::new();
        reader.read_line(&mut line)?;
        let mut words = line.split_whitespace();
        let method = words.next().unwrap_or_default().to_owned();
        let name = words.next().unwrap_or_default().to_owned();
        let mut length = 0;
        loop {
            let mut header = String::new();
            reader.read_line(&mut header)?;
            let header = header.trim_end();
            if header.is_empty() {
                break;
            }
            if let Some((key, value)) = header.split_once(':')
                && key.eq_ignore_ascii_case("content-length")
            {
                length = value.trim().parse()?;
            }
        }
        ensure!(length <= MOST_BYTES, "a body of {length} bytes");
        let mut body = String::new();
        reader.take(length).read_to_string(&mut body)?;
        let name = name.strip_prefix("/api/v1/").unwrap_or_default();
        let (status, text) = match self.handle(&method, name, &body) {
            Ok(text) if text.is_empty() => ("204 No Content", text),
            Ok(text) => ("200 OK", text),
            Err(error) => ("400 Bad Request", json!([format!("{error:#}")]).to_string()),
        };
        let mut stream = stream;
        write!(
            stream,
            "HTTP/1.1 {status}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{text}",
            text.len()
        )?;
        Ok(())
    }

    fn handle(&self, method: &str, name: &str, body: &str) -> Result<String> {
        Ok(match (method, name) {
            ("GET", "vmm.ping") => {
                let pid = std::process::id();
                json!({ "version": env!("CARGO_PKG_VERSION"), "pid": pid }).to_string()
            }
            ("GET", "vm.info") => {
                let memory = json!({ "size": self.region.bytes(), "mergeable": true });
                let config = json!({ "memory": memory });
                json!({ "state": "Running", "config": config }).to_string()
            }
            ("GET", "vm.memory-sample") => serde_json::to_string(&self.look())?,
            ("PUT", "vm.memory-sample") => {
                serde_json::to_string(&self.hash(&serde_json::from_str(body)?)?)?
            }
            ("PUT", "vm.memory-advice") => {
                self.advise(&serde_json::from_str(body)?)?;
                String::new()
            }
            _ => bail!("{method} {name}: a holder of memory does not know that"),
        })
    }

    fn all(&self) -> wire::MemoryRange {
        wire::MemoryRange {
            start: 0,
            len: self.region.bytes(),
        }
    }

    fn look(&self) -> wire::MemoryMergeable {
        let offered = self.offered.lock().unwrap_or_else(PoisonError::into_inner);
        wire::MemoryMergeable {
            trust_domain: Some(DOMAIN.to_owned()),
            mergeable: vec![self.all()],
            offered: runs(&offered),
        }
    }

    fn hash(&self, wanted: &wire::MemorySample) -> Result<wire::MemoryHashes> {
        ensure!(wanted.trust_domain == DOMAIN, "another domain");
        let key = u128::from_str_radix(&wanted.key, 16).context("key")?;
        ensure!(wanted.one_of > 0, "one_of is 0");
        self.check(&wanted.range)?;
        let extents = hashes::of(
            &self.region,
            &wanted.range,
            key.to_be_bytes(),
            wanted.one_of,
        )?;
        Ok(wire::MemoryHashes { extents })
    }

    fn check(&self, range: &wire::MemoryRange) -> Result<()> {
        let end = range.start.checked_add(range.len).context("range")?;
        let is_whole = range.start.is_multiple_of(PAGE) && range.len.is_multiple_of(PAGE);
        ensure!(is_whole && end <= self.region.bytes(), "not its memory");
        Ok(())
    }

    fn advise(&self, wanted: &wire::MemoryAdvice) -> Result<()> {
        ensure!(wanted.trust_domain == DOMAIN, "another domain");
        let all = [self.all()];
        let ranges = match wanted.ranges.is_empty() {
            true => &all[..],
            false => &wanted.ranges,
        };
        for range in ranges {
            self.check(range)?;
            self.tell(range, wanted.advice)?;
        }
        Ok(())
    }

    fn tell(&self, range: &wire::MemoryRange, advice: wire::Advice) -> Result<()> {
        let (advice, offered) = match advice {
            wire::Advice::Mergeable => (Advice::Mergeable, Some(true)),
            wire::Advice::Unmergeable => (Advice::Unmergeable, Some(false)),
            wire::Advice::Thp => (Advice::Thp, None),
            wire::Advice::NoThp => (Advice::NoThp, None),
        };
        let mut flags = self.offered.lock().unwrap_or_else(PoisonError::into_inner);
        self.region.advise(range.start, range.len, advice)?;
        if let Some(offered) = offered {
            let (first, count) = (range.start / PAGE, range.len / PAGE);
            flags[first as usize..(first + count) as usize].fill(offered);
        }
        Ok(())
    }

    /// Offers everything, as `--memory mergeable=always` does.
    pub(super) fn offer_all(&self) -> Result<()> {
        self.tell(&self.all(), wire::Advice::Mergeable)
    }
}

/// Runs of pages that are set.
fn runs(flags: &[bool]) -> Vec<wire::MemoryRange> {
    let mut runs: Vec<wire::MemoryRange> = Vec::new();
    for (page, _) in (0u64..).zip(flags).filter(|(_, set)| **set) {
        match runs.last_mut() {
            Some(run) if run.start + run.len == page * PAGE => run.len += PAGE,
            _ => runs.push(wire::MemoryRange {
                start: page * PAGE,
                len: PAGE,
            }),
        }
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_whole() {
        let run = |start, len| wire::MemoryRange {
            start: start * PAGE,
            len: len * PAGE,
        };
        let flags = [true, true, false, true, false, false];
        assert_eq!(runs(&flags), [run(0, 2), run(3, 1)]);
        assert_eq!(runs(&[false; 3]), []);
    }

    #[test]
    fn it_answers_what_a_tuner_asks() {
        let region = std::sync::Arc::new(Region::new(4 << 20).unwrap());
        region.write_page(1, &[5; 4096]);
        let api = Api {
            offered: Mutex::new(vec![false; 1024]),
            region,
        };
        let info: wire::VmInfo =
            serde_json::from_str(&api.handle("GET", "vm.info", "").unwrap()).unwrap();
        assert_eq!(info.config.memory.size, 4 << 20);
        let ping: wire::VmmPing =
            serde_json::from_str(&api.handle("GET", "vmm.ping", "").unwrap()).unwrap();
        assert_eq!(ping.pid, i64::from(std::process::id()));
        let wanted = wire::MemorySample {
            trust_domain: DOMAIN.to_owned(),
            key: "00".repeat(16),
            one_of: 1,
            range: api.all(),
        };
        let hashes = api.hash(&wanted).unwrap();
        let found = hashes.extents.iter().flat_map(|extent| &extent.hashes);
        assert!(found.filter(|hash| **hash != 0).count() == 1);
        let body = format!(
            r#"{{"trust_domain":"{DOMAIN}","advice":"mergeable","ranges":[{{"start":4096,"len":8192}}]}}"#
        );
        if api.handle("PUT", "vm.memory-advice", &body).is_ok() {
            assert_eq!(api.look().offered[0].len, 8192);
        }
        assert!(
            api.handle("PUT", "vm.memory-advice", &body.replace(DOMAIN, "other"))
                .is_err()
        );
        assert!(
            api.handle("PUT", "vm.memory-advice", &body.replace("4096", "4194304"))
                .is_err()
        );
        assert!(api.handle("GET", "vm.boot", "").is_err());
    }
}
