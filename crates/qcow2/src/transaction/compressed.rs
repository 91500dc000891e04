use super::state::{Origin, State, slot};
use crate::entry::L2Entry;
use crate::error::{Error, Place};
use crate::mapping::L2Tables;
use crate::types::{GuestCluster, HostCluster, HostOffset};

impl State {
    /// Stores a cluster that is compressed already, right after the last one of this transaction where it fits.
    pub(super) fn write_compressed(&mut self, cluster: GuestCluster, bytes: &[u8]) -> Result<(), Error> {
        let bits = self.header.cluster_bits;
        let guest = bits.guest_offset(cluster);
        let len = bytes.len() as u64;
        if self.header.has_data_file() {
            return Err(self.file().unsupported("compression with an external data file"));
        }
        if len == 0 || len >= bits.size() {
            return Err(self.invalid("the length of a compressed cluster", len, 1..=bits.size() - 1));
        }
        self.check_range(&(guest.0..guest.0.saturating_add(1)))?;
        self.touch(guest.0..guest.0.saturating_add(bits.size()).min(self.size()));
        self.table_mut(slot(&self.header, cluster).0)?;
        let host = self.pack(len, Place::CompressedData(guest))?;
        self.file().write(bytes, host)?;
        let entry = L2Entry::compressed(host, len, bits)
            .ok_or_else(|| self.invalid("the place of a compressed cluster", host.0, 0..=(1 << 54) - 1))?;
        self.map(cluster, entry, Origin::Own)
    }

    /// Takes `len` bytes for compressed data.
    fn pack(&mut self, len: u64, place: Place) -> Result<HostOffset, Error> {
        let bits = self.header.cluster_bits;
        let at = match self.packed_to.take() {
            Some(at) if self.refcounts.can_add(bits.host_cluster(at))? => {
                let last = bits.host_cluster(at);
                let fits = bits.offset_within(at.0) + len <= bits.size();
                let next = if fits { None } else { Some(self.refcounts.allocate(1)?.start) };
                match next {
                    Some(next) if next != last.0 + 1 => bits.host_offset(HostCluster(next)),
                    _ => {
                        self.refcounts.add(last, place)?;
                        at
                    }
                }
            }
            _ => bits.host_offset(HostCluster(self.refcounts.allocate(1)?.start)),
        };
        let end = at.plus(len);
        self.packed_to = (bits.offset_within(end.0) != 0).then_some(end);
        Ok(at)
    }
}
