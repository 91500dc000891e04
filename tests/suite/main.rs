//! Whole commands on real images, judged by the tools that own the formats.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod bad_input;
mod crash;
mod documentation;
mod image_verbs;
mod locks;
mod main_job;
mod mkfs;
mod qemu_img;
mod qemu_json;
mod sparsify;
mod support;
mod verbs;
