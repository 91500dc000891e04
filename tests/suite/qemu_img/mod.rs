//! `qemu-img` and qtk under that name do the same for the same command lines.
//!
//! Each `NAME.txt` holds cases; their form is described in [`script`]. A case runs once with the `qemu-img` of the path and once
//! with qtk, in folders that are alike; [`run`] compares what they print and how they end, [`images`] what they leave behind.
//!
//! - `QTK_CASES=TEXT` runs only the cases that hold TEXT.
//! - `QTK_UPSTREAM=PROGRAM` runs PROGRAM, a `qemu-img` as QEMU's own release builds it, in qtk's place, and records what it prints
//!   where the path's `qemu-img`, which distributions patch, says something else. Recorded answers take the place of that one's.

mod images;
mod mask;
mod run;
mod script;
mod sequences;

/// A test for each file of cases.
macro_rules! cases {
    ($($name:ident)*) => {$(
        #[test]
        fn $name() {
            run::file(stringify!($name));
        }
    )*};
}

cases!(amend bench bitmap check commit compare convert create dd info map measure options rebase resize snapshot);
