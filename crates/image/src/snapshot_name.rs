use qtk_qcow2::Snapshot;

/// How a user names an internal snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SnapshotName {
    /// Its id, or else its name.
    Any(String),
    /// Its id and its name, as far as they are given.
    Exact {
        /// The id.
        id: Option<String>,
        /// The name.
        name: Option<String>,
    },
}

impl SnapshotName {
    /// The index of the first snapshot that is meant.
    pub(crate) fn find(&self, snapshots: &[Snapshot]) -> Option<usize> {
        match self {
            Self::Any(wanted) => Snapshot::find(snapshots, wanted),
            Self::Exact { id: None, name: None } => None,
            Self::Exact { id, name } => snapshots.iter().position(|snapshot| {
                id.as_ref().is_none_or(|id| snapshot.id == *id)
                    && name.as_ref().is_none_or(|name| snapshot.name == *name)
            }),
        }
    }
}
