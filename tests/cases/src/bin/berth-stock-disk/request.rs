//! One request of a disk (virtio 1.3, 5.2.6): a header, data, and a byte for the status.

use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::ops::Deref;
use std::os::unix::fs::FileExt as _;

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_IN,
    VIRTIO_BLK_T_OUT,
};
use virtio_queue::DescriptorChain;
use vm_memory::GuestMemoryMmap;

/// Bytes of a sector.
pub(crate) const SECTOR: u64 = 512;
/// Largest data of a request; a driver sends less where it was not told of a limit, too.
const MOST: usize = 16 << 20;

/// Does it; how many bytes it has written to the guest.
///
/// # Errors
/// It has no room for a status, so that nobody can be told.
pub(crate) fn serve<M>(
    image: &File,
    sectors: u64,
    memory: &GuestMemoryMmap,
    chain: DescriptorChain<M>,
) -> io::Result<u32>
where
    M: Clone + Deref<Target = GuestMemoryMmap>,
{
    let mut reader = chain.clone().reader(memory).map_err(io::Error::other)?;
    let mut writer = chain.writer(memory).map_err(io::Error::other)?;
    let room = writer.available_bytes();
    let data = room
        .checked_sub(1)
        .ok_or_else(|| io::Error::other("a request without room for its status"))?;
    let mut status_at = writer.split_at(data).map_err(io::Error::other)?;
    let mut header = [0; 16];
    let done = reader.read_exact(&mut header).and_then(|()| {
        let [kind, _, low, high] = [0, 4, 8, 12].map(|at| {
            u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]])
        });
        let sector = u64::from(high) << 32 | u64::from(low);
        match kind {
            VIRTIO_BLK_T_IN => {
                let mut bytes = vec![0; data.min(MOST)];
                image.read_exact_at(&mut bytes, place(sector, sectors, data)?)?;
                writer.write_all(&bytes).map(|()| VIRTIO_BLK_S_OK)
            }
            VIRTIO_BLK_T_OUT => {
                let place = place(sector, sectors, reader.available_bytes())?;
                let mut bytes = vec![0; reader.available_bytes()];
                reader.read_exact(&mut bytes)?;
                image.write_all_at(&bytes, place).map(|()| VIRTIO_BLK_S_OK)
            }
            VIRTIO_BLK_T_FLUSH => image.sync_data().map(|()| VIRTIO_BLK_S_OK),
            _ => Ok(VIRTIO_BLK_S_UNSUPP),
        }
    });
    let status = done.unwrap_or(VIRTIO_BLK_S_IOERR);
    status_at.write_all(&[status as u8])?;
    let written = writer.bytes_written() + 1;
    u32::try_from(written).map_err(io::Error::other)
}

/// Where in the image, if all of it is there.
fn place(sector: u64, sectors: u64, len: usize) -> io::Result<u64> {
    let whole = len <= MOST && (len as u64).is_multiple_of(SECTOR);
    let end = sector.checked_add(len as u64 / SECTOR);
    if whole && end.is_some_and(|end| end <= sectors) {
        Ok(sector * SECTOR)
    } else {
        Err(io::Error::other("not within the disk"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_within_the_disk_has_no_place() {
        assert_eq!(place(2, 4, 1024).expect("its end"), 1024);
        for (sector, len) in [(3, 1024), (u64::MAX, 512), (0, 100), (0, MOST + 512)] {
            assert!(place(sector, 4, len).is_err(), "{sector}, {len}");
        }
    }
}
