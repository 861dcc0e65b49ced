//! What a local disk may hold after a crash: a model of it, fed with the operations that were done.
//!
//! Only what was synced is certain. Bytes written since a file's last sync may be there in any part, by sectors, and
//! the file's length may be any it had or one between. A change of a folder's entries since the folder's last sync may
//! be there or not, each name by itself. A file whose name is lost is lost.

use std::collections::BTreeMap;
use std::path::Path;

use checkpoint_store::DiskOp;

/// What the disk writes whole.
const SECTOR: usize = 512;

/// Numbers from a seed.
pub(crate) struct Dice(pub(crate) u64);

impl Dice {
    /// A number below `n`, which is not 0.
    pub(crate) fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) % n as u64) as usize
    }
}

#[derive(Clone, Copy, PartialEq)]
enum Entry {
    Folder,
    File(usize),
}

enum Change {
    Write(usize, Vec<u8>),
    Resize(usize),
}

#[derive(Default)]
struct Inode {
    synced: Vec<u8>,
    pending: Vec<Change>,
}

/// The disk, as it is and as far as it is certain.
#[derive(Default)]
pub(crate) struct Disk {
    inodes: Vec<Inode>,
    now: BTreeMap<String, Entry>,
    synced: BTreeMap<String, Entry>,
    pending: Vec<(String, Option<Entry>)>,
}

fn parent(path: &str) -> &str {
    path.rsplit_once('/').map_or("", |(folder, _)| folder)
}

fn change(bytes: &mut Vec<u8>, change: &Change, mut keeps: impl FnMut(usize) -> bool) {
    match change {
        Change::Resize(length) => bytes.resize(*length, 0),
        Change::Write(at, new) => {
            if bytes.len() < at + new.len() {
                bytes.resize(at + new.len(), 0);
            }
            for (i, sector) in new.chunks(SECTOR).enumerate() {
                let at = at + i * SECTOR;
                if keeps(at) {
                    bytes[at..at + sector.len()].copy_from_slice(sector);
                }
            }
        }
    }
}

impl Disk {
    /// A disk on which all of a folder is certain.
    pub(crate) fn of(root: &Path) -> Self {
        let mut disk = Self::default();
        let mut waiting = vec![String::new()];
        while let Some(folder) = waiting.pop() {
            for entry in std::fs::read_dir(root.join(&folder)).unwrap() {
                let entry = entry.unwrap();
                let name = entry.file_name().into_string().unwrap();
                let path = if folder.is_empty() { name } else { format!("{folder}/{name}") };
                if entry.file_type().unwrap().is_dir() {
                    disk.synced.insert(path.clone(), Entry::Folder);
                    waiting.push(path);
                } else {
                    let synced = std::fs::read(entry.path()).unwrap();
                    disk.synced.insert(path, Entry::File(disk.inodes.len()));
                    disk.inodes.push(Inode { synced, pending: vec![] });
                }
            }
        }
        disk.now = disk.synced.clone();
        disk
    }

    fn name(&mut self, path: &str, entry: Option<Entry>) {
        match entry {
            Some(entry) => self.now.insert(path.to_owned(), entry),
            None => self.now.remove(path),
        };
        self.pending.push((path.to_owned(), entry));
    }

    fn file(&mut self, path: &str) -> &mut Inode {
        let Some(Entry::File(inode)) = self.now.get(path) else { panic!("{path} is no file") };
        &mut self.inodes[*inode]
    }

    /// Does what was done.
    pub(crate) fn apply(&mut self, op: &DiskOp) {
        match op {
            DiskOp::MakeFolder { path } => self.name(path, Some(Entry::Folder)),
            DiskOp::NewFile { path } => {
                self.inodes.push(Inode::default());
                self.name(path, Some(Entry::File(self.inodes.len() - 1)));
            }
            DiskOp::Write { path, offset, bytes } => {
                let write = Change::Write(*offset as usize, bytes.clone());
                self.file(path).pending.push(write);
            }
            DiskOp::Resize { path, length } => self.file(path).pending.push(Change::Resize(*length as usize)),
            DiskOp::SyncFile { path } => {
                let inode = self.file(path);
                for pending in std::mem::take(&mut inode.pending) {
                    change(&mut inode.synced, &pending, |_| true);
                }
            }
            DiskOp::SyncFolder { path } => {
                let all = std::mem::take(&mut self.pending);
                let (synced, pending) = all.into_iter().partition(|(name, _)| parent(name) == path);
                self.pending = pending;
                for (name, entry) in synced {
                    set(&mut self.synced, &name, entry);
                }
            }
            DiskOp::Link { from, to } => {
                let entry = self.now.get(from).copied();
                self.name(to, entry);
            }
            DiskOp::Rename { from, to } => {
                let entry = self.now.get(from).copied();
                self.name(to, entry);
                self.name(from, None);
            }
            DiskOp::Unlink { path } => self.name(path, None),
        }
    }

    /// One of the states a crash now may leave, made in an empty folder.
    pub(crate) fn crash(&self, dice: &mut Dice, root: &Path) {
        // In the order in which things happened, so that a seed does the same whatever random names they had.
        let mut changes: Vec<(&str, Vec<Option<Entry>>)> = vec![];
        for (name, entry) in &self.pending {
            match changes.iter_mut().find(|(known, _)| known == name) {
                Some((_, states)) => states.push(*entry),
                None => changes.push((name, vec![*entry])),
            }
        }
        let mut names = self.synced.clone();
        for (name, states) in changes {
            // How many of the changes of this name made it.
            if let Some(last) = dice.below(states.len() + 1).checked_sub(1) {
                set(&mut names, name, states[last]);
            }
        }
        let contents: Vec<Vec<u8>> = self.inodes.iter().map(|inode| inode.crash(dice)).collect();
        // Sorted by path, so a folder comes before what is in it.
        for (name, entry) in &names {
            let is_reachable = parent(name).is_empty() || root.join(parent(name)).is_dir();
            match entry {
                _ if !is_reachable => {}
                Entry::Folder => std::fs::create_dir(root.join(name)).unwrap(),
                Entry::File(inode) => std::fs::write(root.join(name), &contents[*inode]).unwrap(),
            }
        }
    }
}

impl Inode {
    fn crash(&self, dice: &mut Dice) -> Vec<u8> {
        let mut bytes = self.synced.clone();
        if self.pending.is_empty() {
            return bytes;
        }
        // Nothing of it, all, up to a place, or any sectors.
        let (mode, place) = (dice.below(4), dice.below(1 << 20));
        if mode == 0 {
            return bytes;
        }
        for pending in &self.pending {
            change(&mut bytes, pending, |at| match mode {
                1 => true,
                2 => at < place,
                _ => dice.below(2) == 0,
            });
        }
        if dice.below(2) == 0 {
            let shortest = self.synced.len().min(bytes.len());
            bytes.truncate(shortest + dice.below(bytes.len() - shortest + 1));
        }
        bytes
    }
}

fn set(names: &mut BTreeMap<String, Entry>, name: &str, entry: Option<Entry>) {
    match entry {
        Some(entry) => names.insert(name.to_owned(), entry),
        None => names.remove(name),
    };
}
