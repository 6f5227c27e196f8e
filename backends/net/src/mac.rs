//! A MAC address, as text and as six bytes.

#![forbid(unsafe_code)]

use std::fmt;
use std::str::FromStr;

use thiserror::Error;

/// An Ethernet address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Mac(pub [u8; 6]);

impl Mac {
    /// ff:ff:ff:ff:ff:ff
    pub const BROADCAST: Self = Self([0xff; 6]);

    /// Whether the group bit is set; broadcast is a group too.
    #[must_use]
    pub fn is_multicast(self) -> bool {
        self.0[0] & 1 != 0
    }
}

/// Why a text is not the MAC address of one interface.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum MacError {
    /// Not six hexadecimal pairs.
    #[error("'{0}' is not a MAC address; expected six hexadecimal pairs like 52:54:00:12:34:56")]
    Syntax(String),
    /// An interface cannot own it.
    #[error("'{0}' cannot be an interface's address: it is a multicast or the all-zero address")]
    NotUnicast(String),
}

impl FromStr for Mac {
    type Err = MacError;

    fn from_str(text: &str) -> Result<Self, MacError> {
        let syntax = || MacError::Syntax(text.to_string());
        let mut bytes = [0_u8; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part = parts.next().ok_or_else(syntax)?;
            if part.len() != 2 || !part.bytes().all(|c| c.is_ascii_hexdigit()) {
                return Err(syntax());
            }
            *byte = u8::from_str_radix(part, 16).map_err(|_| syntax())?;
        }
        if parts.next().is_some() {
            return Err(syntax());
        }
        let mac = Self(bytes);
        if mac.is_multicast() || bytes == [0; 6] {
            return Err(MacError::NotUnicast(text.to_string()));
        }
        Ok(mac)
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parses_and_prints() {
        let mac: Mac = "52:54:00:aB:cd:EF".parse().unwrap();
        assert_eq!(mac, Mac([0x52, 0x54, 0, 0xab, 0xcd, 0xef]));
        assert_eq!(mac.to_string(), "52:54:00:ab:cd:ef");
    }

    #[test]
    fn refuses_what_is_not_an_interface_address() {
        for bad in [
            "",
            "52:54:00:12:34",
            "52:54:00:12:34:56:78",
            "52:54:00:12:34:5",
            "+2:54:00:12:34:56",
        ] {
            assert_eq!(
                bad.parse::<Mac>(),
                Err(MacError::Syntax(bad.to_string())),
                "{bad}"
            );
        }
        for bad in [
            "ff:ff:ff:ff:ff:ff",
            "01:00:5e:00:00:01",
            "00:00:00:00:00:00",
        ] {
            assert_eq!(
                bad.parse::<Mac>(),
                Err(MacError::NotUnicast(bad.to_string())),
                "{bad}"
            );
        }
    }
}
