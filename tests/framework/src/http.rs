//! A client for HTTP/1.1 on a unix socket: the VMM's API and the daemons' metrics.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::Value;

/// Status and body of an answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// Status code.
    pub status: u16,
    /// Body, empty where there is none.
    pub body: String,
}

/// One VM's API socket.
#[derive(Debug, Clone)]
pub struct Api {
    socket: PathBuf,
    limit: Duration,
}

impl Api {
    /// A client of the API at `socket`; each answer may take `limit`.
    #[must_use]
    pub fn new(socket: &Path, limit: Duration) -> Self {
        Self {
            socket: socket.to_owned(),
            limit,
        }
    }

    /// GET `/api/v1/NAME`, which must answer 200 with JSON.
    ///
    /// # Errors
    /// It does not.
    pub fn get(&self, name: &str) -> Result<Value> {
        let answer = self.request("GET", name)?;
        if answer.status != 200 {
            bail!(
                "GET {name}: status {}: {}",
                answer.status,
                answer.body.trim()
            );
        }
        serde_json::from_str(&answer.body).with_context(|| format!("GET {name}: {}", answer.body))
    }

    /// PUT `/api/v1/NAME` without a body, which must answer 200 or 204.
    ///
    /// # Errors
    /// It does not.
    pub fn put(&self, name: &str) -> Result<()> {
        let answer = self.request("PUT", name)?;
        if !matches!(answer.status, 200 | 204) {
            bail!(
                "PUT {name}: status {}: {}",
                answer.status,
                answer.body.trim()
            );
        }
        Ok(())
    }

    /// PUT `/api/v1/NAME` with a body; every status is an answer.
    ///
    /// # Errors
    /// No answer in time.
    pub fn put_json(&self, name: &str, body: &Value) -> Result<Answer> {
        let path = format!("/api/v1/{name}");
        request_with(&self.socket, "PUT", &path, &body.to_string(), self.limit)
            .with_context(|| format!("PUT {name} on {}", self.socket.display()))
    }

    /// Any method on `/api/v1/NAME`; every status is an answer.
    ///
    /// # Errors
    /// No answer in time.
    pub fn request(&self, method: &str, name: &str) -> Result<Answer> {
        request(&self.socket, method, &format!("/api/v1/{name}"), self.limit)
            .with_context(|| format!("{method} {name} on {}", self.socket.display()))
    }
}

/// One request on a connection of its own.
///
/// # Errors
/// The socket is not there, or no whole answer comes in time.
pub fn request(socket: &Path, method: &str, path: &str, limit: Duration) -> Result<Answer> {
    request_with(socket, method, path, "", limit)
}

fn request_with(
    socket: &Path,
    method: &str,
    path: &str,
    body: &str,
    limit: Duration,
) -> Result<Answer> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(limit))?;
    stream.set_write_timeout(Some(limit))?;
    let head = format!(
        "{method} {path} HTTP/1.1\r\nHost: localhost\r\nAccept: */*\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    );
    stream.write_all(head.as_bytes())?;
    read_answer(BufReader::new(stream))
}

fn read_answer(mut stream: impl BufRead) -> Result<Answer> {
    let mut line = String::new();
    stream.read_line(&mut line).context("no answer")?;
    let status = line
        .split_whitespace()
        .nth(1)
        .and_then(|code| code.parse().ok())
        .with_context(|| format!("not an HTTP status line: {line:?}"))?;
    let mut length: Option<u64> = None;
    loop {
        line.clear();
        stream.read_line(&mut line)?;
        let header = line.trim_end();
        if header.is_empty() {
            break;
        }
        if let Some((name, value)) = header.split_once(':')
            && name.eq_ignore_ascii_case("content-length")
        {
            length = Some(value.trim().parse().context("content-length")?);
        }
    }
    let mut body = String::new();
    match (length, status) {
        (Some(length), _) => {
            stream.take(length).read_to_string(&mut body)?;
        }
        (None, 204) => {}
        (None, _) => {
            stream.read_to_string(&mut body)?;
        }
    }
    Ok(Answer { status, body })
}

/// The counters of a daemon's `--metrics-socket`: `name{labels}` to value.
///
/// # Errors
/// No answer in time.
pub fn metrics(socket: &Path, limit: Duration) -> Result<BTreeMap<String, f64>> {
    let answer = request(socket, "GET", "/metrics", limit)
        .with_context(|| format!("metrics of {}", socket.display()))?;
    if answer.status != 200 {
        bail!("metrics of {}: status {}", socket.display(), answer.status);
    }
    Ok(parse_metrics(&answer.body))
}

/// Sum of all series of metric `name`, whatever their labels; none if there is no such series.
#[must_use]
pub fn total(metrics: &BTreeMap<String, f64>, name: &str) -> Option<u64> {
    let mut found = metrics
        .iter()
        .filter(|(series, _)| series.split('{').next() == Some(name))
        .map(|(_, value)| *value)
        .peekable();
    found.peek()?;
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "counters"
    )]
    Some(found.sum::<f64>() as u64)
}

/// Lines of the Prometheus text format without comments and timestamps.
fn parse_metrics(text: &str) -> BTreeMap<String, f64> {
    text.lines()
        .filter(|line| !line.starts_with('#'))
        .filter_map(|line| {
            // Labels may hold spaces; the value follows the last brace, or else the name.
            let split = line
                .rfind('}')
                .map_or_else(|| line.find(' '), |brace| Some(brace + 1))?;
            let (series, rest) = line.split_at(split);
            Some((
                series.to_owned(),
                rest.split_whitespace().next()?.parse().ok()?,
            ))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_with_and_without_bodies() {
        let answer = read_answer(&b"HTTP/1.1 204 No Content\r\nServer: x\r\n\r\n"[..]);
        assert_eq!(
            answer.expect("204"),
            Answer {
                status: 204,
                body: String::new()
            }
        );
        let answer = read_answer(&b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}junk"[..]);
        assert_eq!(
            answer.expect("200"),
            Answer {
                status: 200,
                body: "{}".to_owned()
            }
        );
        assert!(read_answer(&b"nonsense\r\n"[..]).is_err());
    }

    #[test]
    fn metrics_are_summed_over_labels() {
        let metrics = parse_metrics(
            "# TYPE a counter\na{queue=\"0\"} 3\na{queue=\"1\", x=\"y z\"} 4\nab 9 1700000000\n",
        );
        assert_eq!(total(&metrics, "a"), Some(7));
        assert_eq!(total(&metrics, "ab"), Some(9));
        assert_eq!(total(&metrics, "b"), None);
    }
}
