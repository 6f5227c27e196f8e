//! The `key=value,key=value` lists of the command line.
//!
//! A value may stand in double quotes, inside which a comma and an equals sign mean themselves; a
//! doubled quote inside quotes is one quote. Commas between square brackets mean themselves too. A list may open with a bare value where the flag has one
//! (`--kernel PATH,entry=pvh`). A value that begins with a sign is a list of signed words, and goes on over
//! commas for as long as they are followed by a sign (`features=+x,-y`). Every key is known or an error that names the nearest known one.

#![forbid(unsafe_code)]

use std::str::FromStr;

use super::ArgError;

/// Similarity from which a known word is offered for an unknown one.
const NEAR: f64 = 0.6;

/// A parsed list of one flag.
#[derive(Debug)]
pub struct Keys {
    flag: &'static str,
    bare: Option<String>,
    pairs: Vec<(&'static str, String)>,
}

impl Keys {
    /// Parses `text`, given after `flag`, in which only the keys `known` may occur, each once.
    pub fn parse(flag: &'static str, text: &str, known: &[&'static str]) -> Result<Self, ArgError> {
        let mut keys = Self {
            flag,
            bare: None,
            pairs: Vec::new(),
        };
        for (index, item) in split(flag, text)?.into_iter().enumerate() {
            match item {
                Item::Bare(value) if index == 0 => keys.bare = Some(value),
                Item::Bare(value) if keys.goes_on(&value) => {
                    if let Some((_, list)) = keys.pairs.last_mut() {
                        list.push(',');
                        list.push_str(&value);
                    }
                }
                Item::Bare(value) => return Err(ArgError::NoValue { flag, item: value }),
                Item::Pair(key, value) => {
                    let Some(key) = known.iter().copied().find(|name| *name == key) else {
                        return Err(ArgError::UnknownKey {
                            flag,
                            hint: hint(&key, known),
                            key,
                        });
                    };
                    if keys.pairs.iter().any(|(name, _)| *name == key) {
                        return Err(ArgError::KeyTwice { flag, key });
                    }
                    keys.pairs.push((key, value));
                }
            }
        }
        Ok(keys)
    }

    /// Whether a bare word is one more signed word of the value before it.
    fn goes_on(&self, word: &str) -> bool {
        let is_signed = |text: &str| text.starts_with(['+', '-']);
        let last = self.pairs.last();
        is_signed(word) && last.is_some_and(|(_, value)| is_signed(value))
    }

    /// The bare value that the list opened with, taken out.
    pub fn take_bare(&mut self) -> Option<String> {
        self.bare.take()
    }

    /// Ends the reading: a bare value that nobody took is an error.
    pub fn no_bare(&self) -> Result<(), ArgError> {
        match &self.bare {
            Some(item) => Err(ArgError::NoValue {
                flag: self.flag,
                item: item.clone(),
            }),
            None => Ok(()),
        }
    }

    /// The value of `key`, if it was given.
    pub fn text(&self, key: &'static str) -> Option<&str> {
        self.pairs
            .iter()
            .find(|(name, _)| *name == key)
            .map(|(_, value)| value.as_str())
    }

    /// The value of `key`, which must be there and not empty.
    pub fn required(&self, key: &'static str) -> Result<&str, ArgError> {
        match self.text(key) {
            Some(value) if !value.is_empty() => Ok(value),
            _ => Err(ArgError::Missing {
                flag: self.flag,
                key,
            }),
        }
    }

    /// `on|off|true|false`.
    pub fn on_off(&self, key: &'static str) -> Result<Option<bool>, ArgError> {
        self.text(key)
            .map(|value| match value {
                "on" | "true" => Ok(true),
                "off" | "false" => Ok(false),
                _ => Err(self.bad(key, value, "on or off")),
            })
            .transpose()
    }

    /// `[1,2]` or `1`; not empty.
    pub fn list<T: FromStr>(&self, key: &'static str) -> Result<Option<Vec<T>>, ArgError> {
        let Some(value) = self.text(key) else {
            return Ok(None);
        };
        let inside = value.strip_prefix('[').and_then(|v| v.strip_suffix(']'));
        let items = inside.unwrap_or(value).split(',');
        let numbers: Result<Vec<T>, _> = items.map(|item| item.trim().parse()).collect();
        let bad = |_| self.bad(key, value, "a list of numbers in range such as [64,64]");
        numbers.map(Some).map_err(bad)
    }

    /// A decimal number that fits `T`.
    pub fn number<T: FromStr>(&self, key: &'static str) -> Result<Option<T>, ArgError> {
        self.text(key)
            .map(|value| {
                value
                    .parse()
                    .map_err(|_| self.bad(key, value, "a number in range"))
            })
            .transpose()
    }

    /// A size such as `512M`, `5G` or bytes, in bytes.
    pub fn size(&self, key: &'static str) -> Result<Option<u64>, ArgError> {
        self.text(key)
            .map(|value| {
                parse_size(value).ok_or_else(|| self.bad(key, value, "a size such as 512M or 5G"))
            })
            .transpose()
    }

    /// The error for a value that is not what `key` takes.
    pub fn bad(&self, key: &'static str, value: &str, expected: &'static str) -> ArgError {
        ArgError::BadValue {
            flag: self.flag,
            key,
            value: value.to_owned(),
            expected,
        }
    }
}

/// Bytes of `512`, `512K`, `512M`, `5G`, `1T`, with or without a final `iB` or `B`; powers of 1024.
pub fn parse_size(text: &str) -> Option<u64> {
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let number: u64 = text[..digits].parse().ok()?;
    let shift = match text[digits..].to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kib" => 10,
        "m" | "mib" => 20,
        "g" | "gib" => 30,
        "t" | "tib" => 40,
        _ => return None,
    };
    number.checked_mul(1 << shift)
}

/// ` (nearest: 'word')`, or what is known where nothing is near.
pub fn hint(word: &str, known: &[&str]) -> String {
    let near = known
        .iter()
        .map(|name| (strsim::jaro_winkler(word, name), name))
        .filter(|(similarity, _)| *similarity >= NEAR)
        .max_by(|a, b| a.0.total_cmp(&b.0));
    match near {
        Some((_, name)) => format!("nearest: '{name}'"),
        None => format!("known: {}", known.join(", ")),
    }
}

enum Item {
    Bare(String),
    Pair(String, String),
}

fn split(flag: &'static str, text: &str) -> Result<Vec<Item>, ArgError> {
    let mut items = Vec::new();
    let mut key = None;
    let mut word = String::new();
    let mut quoted = false;
    let mut brackets = 0_usize;
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        match c {
            '"' if quoted && chars.peek() == Some(&'"') => {
                chars.next();
                word.push('"');
            }
            '"' => quoted = !quoted,
            ',' if !quoted && brackets == 0 => items.push(item(&mut key, &mut word)),
            '=' if !quoted && key.is_none() => key = Some(std::mem::take(&mut word)),
            _ => {
                match c {
                    '[' if !quoted && key.is_some() => brackets += 1,
                    ']' if !quoted => brackets = brackets.saturating_sub(1),
                    _ => {}
                }
                word.push(c);
            }
        }
    }
    if brackets > 0 {
        return Err(ArgError::OpenBracket {
            flag,
            text: text.to_owned(),
        });
    }
    if quoted {
        return Err(ArgError::OpenQuote {
            flag,
            text: text.to_owned(),
        });
    }
    items.push(item(&mut key, &mut word));
    Ok(items)
}

fn item(key: &mut Option<String>, word: &mut String) -> Item {
    let word = std::mem::take(word);
    match key.take() {
        Some(key) => Item::Pair(key, word),
        None => Item::Bare(word),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Keys, ArgError> {
        Keys::parse("--disk", text, &["socket", "readonly", "num_queues"])
    }

    #[test]
    fn pairs_and_a_bare_value_are_told_apart() {
        let mut keys = parse("/boot/vmlinux,readonly=on,socket=a=b").unwrap();
        assert_eq!(keys.take_bare().as_deref(), Some("/boot/vmlinux"));
        assert_eq!(keys.on_off("readonly").unwrap(), Some(true));
        assert_eq!(keys.text("socket"), Some("a=b"));
        assert_eq!(keys.number::<u16>("num_queues").unwrap(), None);
    }

    #[test]
    fn a_list_of_signed_words_goes_on_over_commas() {
        let keys = parse("socket=+a,-b,+c,readonly=on").unwrap();
        assert_eq!(keys.text("socket"), Some("+a,-b,+c"));
        assert_eq!(keys.on_off("readonly").unwrap(), Some(true));
        for text in ["socket=a,-b", "socket=+a,b", "readonly=on,-b"] {
            assert!(parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn quotes_protect_commas_and_quotes() {
        let keys = parse(r#"socket="/tmp/a,b=c""d""#).unwrap();
        assert_eq!(keys.text("socket"), Some("/tmp/a,b=c\"d"));
    }

    #[test]
    fn a_list_in_brackets_is_one_value() {
        let keys = parse("num_queues=[1,2],socket=\"a[\"").unwrap();
        assert_eq!(keys.list::<u16>("num_queues").unwrap(), Some(vec![1, 2]));
        assert_eq!(keys.text("socket"), Some("a["));
        assert!(parse("socket=[1,2").is_err());
        assert_eq!(
            parse("num_queues=7").unwrap().list("num_queues").unwrap(),
            Some(vec![7])
        );
        for text in ["[]", "", "[1,]", "[70000]", "[1"] {
            let keys = parse(&format!("num_queues=\"{text}\"")).unwrap();
            assert!(keys.list::<u16>("num_queues").is_err(), "{text}");
        }
    }

    #[test]
    fn what_is_wrong_is_said_in_one_line() {
        let cases = [
            (
                "sokcet=/a",
                "--disk: unknown key 'sokcet' (nearest: 'socket')",
            ),
            (
                "zzz=1",
                "--disk: unknown key 'zzz' (known: socket, readonly, num_queues)",
            ),
            ("socket=a,socket=b", "--disk: 'socket' is given twice"),
            (
                "socket=a,b",
                "--disk: 'b' has no value, write it as key=value",
            ),
            ("socket=\"a", "--disk: a quote is left open in 'socket=\"a'"),
        ];
        for (text, message) in cases {
            assert_eq!(parse(text).unwrap_err().to_string(), message, "{text}");
        }
        let keys = parse("readonly=maybe,num_queues=70000").unwrap();
        assert_eq!(
            keys.on_off("readonly").unwrap_err().to_string(),
            "--disk: readonly=maybe is not on or off"
        );
        assert!(keys.number::<u16>("num_queues").is_err());
        assert_eq!(
            keys.required("socket").unwrap_err().to_string(),
            "--disk: socket= is missing"
        );
    }

    #[test]
    fn sizes() {
        for (text, size) in [
            ("0", Some(0)),
            ("512M", Some(512 << 20)),
            ("5G", Some(5 << 30)),
            ("5GiB", Some(5 << 30)),
            ("1t", Some(1 << 40)),
            ("4096", Some(4096)),
            ("", None),
            ("M", None),
            ("12Q", None),
            ("-1", None),
            ("1.5G", None),
            ("99999999T", None),
            ("99999999999999999999", None),
        ] {
            assert_eq!(parse_size(text), size, "{text}");
        }
    }
}
