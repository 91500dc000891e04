//! Looks for damage in a whole file system without changing it, as `e2fsck -fn` does.
//!
//! One pass over the groups' descriptors, one over all inodes, one over all directories, and one over the bitmaps; in each,
//! threads share the groups or directories. Memory is one bit for each cluster of the groups in use and some bytes for each
//! inode of the tables that were ever used.

mod ahead;
mod attributes;
mod bitmaps;
mod connect;
mod directories;
mod finding;
mod groups;
mod index;
mod inodes;
mod journal;
mod map;
mod orphans;
mod parallel;
mod resize;
mod state;
mod superblock;
mod symlinks;
mod usage;

use std::num::NonZeroUsize;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use qtk_block::BlockRead;

use crate::error::{Error, Result};
use crate::features::{Features, incompat, ro_compat};
use crate::fs::Ext4;
use crate::group::GroupDescriptor;
use directories::Directories;
use finding::Findings;
pub use finding::{Finding, FindingKind};
use inodes::Orphans;
use state::{InodeStates, Role};
use usage::BlockUse;

/// Findings that a report lists if nothing else is asked for.
const DEFAULT_LIMIT: usize = 1000;

/// How a file system is checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct CheckOptions {
    /// Threads to use.
    pub threads: NonZeroUsize,
    /// The most findings to list; all are counted.
    pub limit: usize,
}

impl Default for CheckOptions {
    fn default() -> Self {
        Self { threads: std::thread::available_parallelism().unwrap_or(NonZeroUsize::MIN), limit: DEFAULT_LIMIT }
    }
}

/// What a check found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct CheckReport {
    /// The first findings, sorted by kind and place.
    pub findings: Vec<Finding>,
    /// How many things are damaged.
    pub damages: u64,
    /// How many oddities there are that the next mount puts right.
    pub notes: u64,
    /// Whether the check came to its end. It stops where damage leaves nothing to go on with.
    pub is_complete: bool,
    /// Whether the journal was played into memory first, so that the check is one of what the next mount will see.
    pub journal_replayed: bool,
    /// What the check leaves out of this file system.
    pub not_covered: Vec<&'static str>,
    /// Inodes in use, those without names too.
    pub inodes_in_use: u64,
    /// Directories among them.
    pub directories: u64,
    /// Blocks in use.
    pub blocks_in_use: u64,
}

impl CheckReport {
    /// Whether nothing is damaged.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        self.damages == 0
    }
}

/// A file system under check.
struct Check<'a> {
    fs: &'a Ext4,
    findings: &'a Findings,
}

impl Check<'_> {
    fn features(&self) -> Features {
        self.fs.superblock.features()
    }

    fn has_compat(&self, bit: u32) -> bool {
        self.features().has_compat(bit)
    }

    fn has_incompat(&self, bit: u32) -> bool {
        self.features().has_incompat(bit)
    }

    fn has_ro_compat(&self, bit: u32) -> bool {
        self.features().has_ro_compat(bit)
    }

    /// Whether groups may be marked as never written.
    fn has_group_flags(&self) -> bool {
        self.has_ro_compat(ro_compat::GDT_CSUM | ro_compat::METADATA_CSUM)
    }

    /// The files that keep quotas, by the superblock.
    fn quota_inodes(&self) -> impl Iterator<Item = u32> {
        let raw = self.fs.superblock.raw();
        let on = self.has_ro_compat(ro_compat::QUOTA);
        let all = [raw.usr_quota_ino, raw.grp_quota_ino, raw.project_quota_ino];
        all.into_iter().map(|ino| ino.get()).filter(move |&ino| on && ino != 0)
    }

    /// Whether no directory has an entry for a file, though its inode is an ordinary one.
    fn is_hidden_file(&self, number: u32) -> bool {
        self.quota_inodes().any(|ino| ino == number) || self.fs.superblock.raw().orphan_file_ino.get() == number
    }
}

/// What inodes claim for themselves.
struct Claims<'a> {
    check: &'a Check<'a>,
    findings: &'a Findings,
    groups: &'a [GroupDescriptor],
    blocks: BlockUse,
    /// What lies at fixed places alone.
    fixed: BlockUse,
    uses: attributes::Uses,
    orphans: &'a Orphans,
    /// The last inode number with a meaning of its own.
    first_ordinary: u32,
    /// Whether times in the superblock are ones that a clock gave, so that small times are no times.
    times_are_real: bool,
    large_file: AtomicBool,
}

impl<'a> Claims<'a> {
    fn new(check: &'a Check<'a>, findings: &'a Findings, groups: &'a [GroupDescriptor], orphans: &'a Orphans) -> Self {
        let raw = check.fs.superblock.raw();
        let inodes = check.fs.geometry().inodes;
        let real = |time: u32| time == 0 || time >= inodes;
        let times_are_real = real(raw.wtime.get()) && real(raw.mtime.get()) && real(raw.mkfs_time.get());
        let claims = Self {
            check,
            findings,
            groups,
            blocks: BlockUse::new(check.fs),
            fixed: BlockUse::new(check.fs),
            uses: attributes::Uses::default(),
            orphans,
            first_ordinary: check.fs.geometry().first_ino,
            times_are_real,
            large_file: AtomicBool::new(false),
        };
        groups::claim(check, &claims);
        claims
    }

    /// Says that a file needs more than 31 bits for its size.
    fn saw_large_file(&self) {
        self.large_file.store(true, Ordering::Relaxed);
    }
}

/// Looks at every structure of the file system at the front of `device`, which is only read. A journal that was not played to
/// its end is played into memory first.
///
/// # Errors
/// [`Error::Unsupported`] names a feature that keeps the file system from being understood, [`Error::Io`] what could not be
/// read. Damage is no error, but part of the report.
pub fn check(device: Arc<dyn BlockRead>, options: &CheckOptions) -> Result<CheckReport> {
    let findings = Findings::new(options.limit);
    let mut report = CheckReport::default();
    match run(device, options, &findings, &mut report) {
        Err(Error::Corrupt { place, problem }) => {
            let kind = match place {
                crate::Place::Superblock => FindingKind::Superblock,
                crate::Place::Journal(_) => FindingKind::Journal,
                crate::Place::Group(_) => FindingKind::Group,
                _ => FindingKind::Inode,
            };
            findings.damage(kind, place, problem);
            report.is_complete = false;
        }
        result => result?,
    }
    let found = findings.into_found();
    report.findings = found.first.into_iter().collect();
    report.damages = found.damages;
    report.notes = found.notes;
    Ok(report)
}

fn run(
    device: Arc<dyn BlockRead>,
    options: &CheckOptions,
    findings: &Findings,
    report: &mut CheckReport,
) -> Result<()> {
    let mut fs = Ext4::load(Arc::clone(&device))?;
    fs.superblock.features().check_known()?;
    if fs.superblock.needs_recovery() {
        fs = Ext4::open(device)?;
        report.journal_replayed = true;
    }
    let check = Check { fs: &fs, findings };
    superblock::check(&check);
    let Some(groups) = groups::read(&check)? else { return Ok(()) };
    journal::check(&check)?;
    let orphans = orphans::read(&check)?;
    let whole = Passes { check: &check, groups: &groups, orphans: &orphans };
    // Who meets whom first depends on timing where claims overlap: one thread then finds the same in every run.
    let attempt = Findings::new(options.limit);
    let shared = whole.run(options.threads, &attempt, report)?;
    if shared && options.threads.get() > 1 {
        let again = Findings::new(options.limit);
        whole.run(NonZeroUsize::MIN, &again, report)?;
        findings.absorb(again);
    } else {
        findings.absorb(attempt);
    }
    report.not_covered = not_covered(&check);
    report.is_complete = true;
    Ok(())
}

/// Parts of a file system that are read past.
fn not_covered(check: &Check<'_>) -> Vec<&'static str> {
    let parts = [
        (check.has_ro_compat(ro_compat::QUOTA), "quota usage"),
        (check.has_incompat(incompat::CASEFOLD), "the order of casefolded names other than ASCII"),
        (check.has_incompat(incompat::MMP), "the state of multiple mount protection"),
        (check.has_ro_compat(ro_compat::VERITY), "the content of verity files"),
    ];
    parts.into_iter().filter(|(present, _)| *present).map(|(_, part)| part).collect()
}

/// The passes over inodes, directories and bitmaps.
struct Passes<'a> {
    check: &'a Check<'a>,
    groups: &'a [GroupDescriptor],
    orphans: &'a Orphans,
}

impl Passes<'_> {
    /// Gives whether blocks were claimed more than once.
    fn run(&self, threads: NonZeroUsize, findings: &Findings, report: &mut CheckReport) -> Result<bool> {
        let check = Check { fs: self.check.fs, findings };
        let claims = Claims::new(&check, findings, self.groups, self.orphans);
        let (states, dirs) = inodes::scan(&claims, threads)?;
        if claims.blocks.has_shared() && threads.get() > 1 {
            return Ok(true);
        }
        attributes::check_uses(&claims)?;
        if claims.large_file.load(Ordering::Relaxed) && !check.has_ro_compat(ro_compat::LARGE_FILE) {
            findings.superblock("there are large files, but large_file is off");
        }
        Directories { claims: &claims, states: &states, dirs: &dirs }.check(threads)?;
        connect::check_tree(&claims, &dirs);
        connect::check_links(&claims, &states);
        let totals = bitmaps::check(&claims, &states, threads)?;
        count(report, &check, &states, totals);
        report.directories = dirs.0.len() as u64;
        Ok(claims.blocks.has_shared())
    }
}

fn count(report: &mut CheckReport, check: &Check<'_>, states: &InodeStates, totals: bitmaps::Totals) {
    let geometry = check.fs.geometry();
    let groups = (0..geometry.groups).map(crate::GroupNr);
    let used = groups.flat_map(|group| states.of_group(group)).filter(|state| state.role != Role::Unused).count();
    report.inodes_in_use = used as u64;
    report.blocks_in_use =
        geometry.blocks.saturating_sub(totals.free_clusters * u64::from(geometry.blocks_per_cluster));
}
