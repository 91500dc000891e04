//! Writes a file into the guest of an image, in one transaction. Usage: `cargo run --example edit -- IMAGE PATH TEXT`

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use qtk_disk::{EditOptions, GuestPath, Timestamp, Tree};
use qtk_guest::WriteOptions;
use qtk_image::{Image, OpenOptions};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let (Some(image), Some(path), Some(text)) = (arguments.next(), arguments.next(), arguments.next()) else {
        return Err("usage: edit IMAGE PATH TEXT".into());
    };
    let transaction = Arc::new(Image::open(&image, &OpenOptions::writable())?.begin()?);
    let elapsed = SystemTime::now().duration_since(UNIX_EPOCH)?;
    let now = Timestamp { seconds: i64::try_from(elapsed.as_secs())?, nanos: elapsed.subsec_nanos() };

    let mut tree = Tree::open_rw(Arc::clone(&transaction) as _, None, EditOptions::new(now))?;
    qtk_guest::write(&mut tree, &GuestPath::from(&path), &mut text.as_bytes(), &WriteOptions::default())?;
    tree.commit()?;
    // Until here the image is as it was.
    transaction.commit()?;
    Ok(())
}
