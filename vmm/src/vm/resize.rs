//! `vm.resize`: what a guest has more or less of while it is there. Of vCPUs and RAM it keeps what it has.

#![forbid(unsafe_code)]

use std::sync::Arc;

use super::driver::Driver;
use super::requests::{Failure, Resize};
use super::state::{Action, Refusal, accept};
use crate::config::VmConfig;

impl Driver {
    /// Changes the configuration, and asks the guest if there is one; does not wait for it.
    pub(super) fn resize(&mut self, resize: Resize) -> Result<(), Failure> {
        accept(self.state, Action::Resize)?;
        let config = self.config.as_ref().ok_or(Refusal::NotCreated)?;
        let resized = resized(config, resize)?;
        self.validate(&resized)?;
        let handle = self.machine.as_deref().and_then(|m| m.balloon.as_ref());
        if let (Some(handle), Some(bytes)) = (handle, resize.balloon_bytes) {
            handle.set_target(bytes);
            tracing::info!(bytes, "the balloon was given another size");
        }
        self.config = Some(Arc::new(resized));
        Ok(())
    }
}

/// The configuration from then on.
fn resized(config: &VmConfig, resize: Resize) -> Result<VmConfig, Failure> {
    let unsupported = |what| Err(Failure::Unsupported(format!("vm.resize: {what}")));
    // Clients send what is there already.
    if resize
        .vcpus
        .is_some_and(|vcpus| vcpus != u32::from(config.cpus.boot))
    {
        return unsupported("desired_vcpus: the number of vCPUs cannot be changed");
    }
    if resize
        .ram_bytes
        .is_some_and(|ram| ram != config.memory.size_bytes)
    {
        return unsupported(
            "desired_ram: the size of RAM cannot be changed, that of a balloon can",
        );
    }
    let mut resized = config.clone();
    if let Some(bytes) = resize.balloon_bytes {
        let Some(balloon) = &mut resized.balloon else {
            let text = "vm.resize: desired_balloon: the guest has no balloon (--balloon size=0)";
            return Err(Failure::Invalid(text.to_owned()));
        };
        balloon.size_bytes = bytes;
    }
    Ok(resized)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{convert, testing};

    fn resize(vcpus: Option<u32>, ram_bytes: Option<u64>, balloon: Option<u64>) -> Resize {
        Resize {
            vcpus,
            ram_bytes,
            balloon_bytes: balloon,
        }
    }

    #[test]
    fn a_balloon_is_resized_and_nothing_else() {
        let mut config = testing::config();
        config.balloon = Some(convert::balloon("size=0,deflate_on_oom=on").unwrap());
        let all = resize(Some(1), Some(512 << 20), Some(64 << 20));
        let balloon = resized(&config, all).unwrap().balloon.unwrap();
        assert_eq!(balloon.size_bytes, 64 << 20);
        assert!(balloon.deflate_on_oom);
        let same = resize(None, None, None);
        assert_eq!(resized(&config, same).unwrap(), config);
    }

    #[test]
    fn what_cannot_be_resized_says_so() {
        let config = testing::config();
        let error = |asked| resized(&config, asked).unwrap_err();
        for asked in [
            resize(Some(2), None, None),
            resize(None, Some(1 << 30), None),
        ] {
            let error = error(asked);
            assert!(matches!(error, Failure::Unsupported(_)), "{error}");
        }
        let error = error(resize(None, None, Some(0)));
        assert!(matches!(&error, Failure::Invalid(text) if text.contains("no balloon")));
    }
}
