//! HTTP/1.1, as much of it as the API needs: requests out of bytes, answers into bytes.
//!
//! Pure and bounded: a head of at most [`MAX_HEAD`] bytes, a body of at most [`MAX_BODY`] with a
//! Content-Length. Chunked bodies are refused. Reference: RFC 9112.

#![forbid(unsafe_code)]

use std::os::fd::OwnedFd;

/// Longest request line and headers.
pub const MAX_HEAD: usize = 8 << 10;
/// Longest body.
pub const MAX_BODY: usize = 64 << 10;
/// Most headers.
const MAX_HEADERS: usize = 64;

/// A request.
#[derive(Debug)]
pub struct Request {
    /// Method, as sent.
    pub method: String,
    /// Path without its query.
    pub path: String,
    /// Whether the client may send another.
    pub keep_alive: bool,
    /// Body.
    pub body: Vec<u8>,
    /// Descriptors that came along; the parser sees none.
    pub fds: Vec<OwnedFd>,
}

/// What the bytes so far are.
#[derive(Debug)]
pub enum Parsed {
    /// The beginning of a request.
    Incomplete,
    /// A request, and the length of it in bytes.
    Complete(Request, usize),
    /// No request that is served; the connection is to be closed after an answer of this kind.
    Bad(Status, &'static str),
}

/// Status of an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    /// With a body.
    Ok,
    /// Without.
    NoContent,
    /// Not understood.
    BadRequest,
    /// Not by this client.
    Forbidden,
    /// Not there.
    NotFound,
    /// There already.
    Conflict,
    /// Head or body too long.
    TooLarge,
    /// Refused or failed.
    InternalServerError,
    /// Known to others, and not served here.
    NotImplemented,
}

impl Status {
    fn line(self) -> &'static str {
        match self {
            Self::Ok => "200 OK",
            Self::NoContent => "204 No Content",
            Self::BadRequest => "400 Bad Request",
            Self::Forbidden => "403 Forbidden",
            Self::NotFound => "404 Not Found",
            Self::Conflict => "409 Conflict",
            Self::TooLarge => "413 Content Too Large",
            Self::InternalServerError => "500 Internal Server Error",
            Self::NotImplemented => "501 Not Implemented",
        }
    }
}

/// An answer.
#[derive(Debug, PartialEq, Eq)]
pub struct Response {
    /// Status.
    pub status: Status,
    /// JSON.
    pub body: Option<String>,
}

impl Response {
    /// An error with its messages.
    pub fn error(status: Status, messages: &[&str]) -> Self {
        Self {
            status,
            body: Some(serde_json::json!(messages).to_string()),
        }
    }

    /// The bytes of it.
    pub fn to_bytes(&self, keep_alive: bool) -> Vec<u8> {
        let connection = if keep_alive { "keep-alive" } else { "close" };
        let mut head = format!(
            "HTTP/1.1 {}\r\nServer: berth-vmm\r\nConnection: {connection}\r\n",
            self.status.line()
        );
        if let Some(body) = &self.body {
            head.push_str("Content-Type: application/json\r\n");
            head.push_str(&format!("Content-Length: {}\r\n\r\n{body}", body.len()));
        } else if self.status == Status::NoContent {
            head.push_str("\r\n");
        } else {
            head.push_str("Content-Length: 0\r\n\r\n");
        }
        head.into_bytes()
    }
}

/// Reads one request from the start of `bytes`.
pub fn parse(bytes: &[u8]) -> Parsed {
    let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut request = httparse::Request::new(&mut headers);
    let head = match request.parse(bytes) {
        Ok(httparse::Status::Complete(head)) if head <= MAX_HEAD => head,
        Ok(httparse::Status::Partial) if bytes.len() <= MAX_HEAD => return Parsed::Incomplete,
        Ok(_) | Err(httparse::Error::TooManyHeaders) => {
            return Parsed::Bad(Status::TooLarge, "the head of the request is too long");
        }
        Err(_) => return Parsed::Bad(Status::BadRequest, "not an HTTP request"),
    };
    let (Some(method), Some(target), Some(version)) =
        (request.method, request.path, request.version)
    else {
        return Parsed::Bad(Status::BadRequest, "not an HTTP request");
    };
    let mut keep_alive = version == 1;
    let mut body = None;
    for header in request.headers.iter() {
        let value = std::str::from_utf8(header.value).unwrap_or_default().trim();
        if header.name.eq_ignore_ascii_case("content-length") {
            let digits = !value.is_empty() && value.bytes().all(|byte| byte.is_ascii_digit());
            match value.parse::<usize>() {
                // Two lengths that differ are how requests are smuggled.
                Ok(len) if digits && body.is_none_or(|other| other == len) => body = Some(len),
                _ => return Parsed::Bad(Status::BadRequest, "bad Content-Length"),
            }
        } else if header.name.eq_ignore_ascii_case("transfer-encoding") {
            return Parsed::Bad(Status::BadRequest, "chunked bodies are not served");
        } else if header.name.eq_ignore_ascii_case("connection") {
            let has = |word: &str| {
                let mut words = value.split(',');
                words.any(|part| part.trim().eq_ignore_ascii_case(word))
            };
            keep_alive = (keep_alive || has("keep-alive")) && !has("close");
        }
    }
    let body = body.unwrap_or(0);
    if body > MAX_BODY {
        return Parsed::Bad(Status::TooLarge, "the body of the request is too long");
    }
    if bytes.len() < head + body {
        return Parsed::Incomplete;
    }
    let path = target.split('?').next().unwrap_or_default();
    let request = Request {
        method: method.to_owned(),
        path: path.to_owned(),
        keep_alive,
        body: bytes[head..head + body].to_vec(),
        fds: Vec::new(),
    };
    Parsed::Complete(request, head + body)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PING: &str = "GET /api/v1/vmm.ping HTTP/1.1\r\nHost: x\r\n\r\n";

    fn bad(text: &str) -> Status {
        match parse(text.as_bytes()) {
            Parsed::Bad(status, _) => status,
            other => panic!("{text:?}: {other:?}"),
        }
    }

    #[test]
    fn every_beginning_of_a_request_is_incomplete() {
        for len in 0..PING.len() {
            let parsed = parse(&PING.as_bytes()[..len]);
            assert!(matches!(parsed, Parsed::Incomplete), "{len}");
        }
        let Parsed::Complete(request, len) = parse(PING.as_bytes()) else {
            panic!("not complete");
        };
        assert_eq!(
            (request.path.as_str(), len),
            ("/api/v1/vmm.ping", PING.len())
        );
        assert!(request.keep_alive);
    }

    #[test]
    fn a_body_belongs_to_its_request() {
        let text = "PUT /p?q=1 HTTP/1.1\r\nContent-Length: 3\r\nConnection: close\r\n\r\nabcGET";
        let Parsed::Complete(request, len) = parse(text.as_bytes()) else {
            panic!("not complete");
        };
        assert_eq!(
            (request.method.as_str(), request.path.as_str()),
            ("PUT", "/p")
        );
        assert!(!request.keep_alive);
        assert_eq!(request.body, b"abc");
        assert_eq!(&text[len..], "GET");
    }

    #[test]
    fn what_is_not_served_is_refused_at_once() {
        let long = format!("GET /{} HTTP/1.1\r\n", "a".repeat(MAX_HEAD));
        assert_eq!(bad(&long), Status::TooLarge);
        let head = "PUT / HTTP/1.1\r\n";
        for (header, status) in [
            ("Content-Length: -1", Status::BadRequest),
            ("Content-Length: +1", Status::BadRequest),
            ("Content-Length: 99999999999999999999", Status::BadRequest),
            ("Content-Length: 1\r\nContent-Length: 2", Status::BadRequest),
            ("Content-Length: 100000", Status::TooLarge),
            ("Transfer-Encoding: chunked", Status::BadRequest),
        ] {
            assert_eq!(bad(&format!("{head}{header}\r\n\r\n")), status, "{header}");
        }
        assert_eq!(bad("\x16\x03\x01\x02\x00"), Status::BadRequest);
        let many = format!("{head}{}\r\n", "A: b\r\n".repeat(MAX_HEADERS + 1));
        assert_eq!(bad(&many), Status::TooLarge);
    }

    #[test]
    fn an_answer_without_a_body_says_so() {
        let response = Response {
            status: Status::NoContent,
            body: None,
        };
        let text = String::from_utf8(response.to_bytes(true)).unwrap();
        assert!(text.starts_with("HTTP/1.1 204 No Content\r\n"), "{text}");
        assert!(!text.contains("Content-Length"), "{text}");
        assert!(text.ends_with("\r\n\r\n"), "{text}");
    }

    #[test]
    fn no_bytes_are_too_strange() {
        let seed =
            b"PUT /api/v1/vm.pause HTTP/1.1\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}";
        let mut random = 0x2545_f491_4f6c_dd1d_u64;
        let mut next = || {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            random as usize
        };
        for _ in 0..20_000 {
            let mut bytes = seed.to_vec();
            for _ in 0..next() % 6 {
                let at = next() % bytes.len();
                match next() % 3 {
                    0 => bytes[at] = next() as u8,
                    1 => bytes.insert(at, next() as u8),
                    _ => drop(bytes.remove(at)),
                }
            }
            if let Parsed::Complete(_, len) = parse(&bytes) {
                assert!(len <= bytes.len(), "{bytes:?}");
            }
        }
    }
}
