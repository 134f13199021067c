//! A profile: what an archive of an earlier variant says of how to pack another of the same base.
//!
//! Variants of a family change alike: a tensor that was coded as differences is again, and one to which a product was added
//! gets another. So an earlier variant's archive is all that has to be known: for each tensor of the base how the one that
//! starts from it was coded, in which order, with which table for each run, and what that took. A tensor that changed alike is
//! coded so without a look at what else there is. One that turns out not to is decided as without a profile: whether it did is
//! seen by what some of its strips take, beside what they took then and what they take with tables of their own
//! ([`super::difference`]).
//!
//! What is made with a profile is an archive like any other: the tables that it uses are its own copies.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::base::{Base, packed_in};
use super::difference::KnownDifferences;
use super::entropy_model::{StreamKind, TablePool, class_of_table};
use crate::archive::{Archive, ArchiveError, PartAddress};
use crate::codec::low_rank::LowRank;
use crate::decode::prepared::Motions;
use crate::decode::{DecodeError, Pools, PreparedPart};
use crate::format::difference::BaseTensor;
use crate::format::part::PartHeader;
use crate::tensor::TensorInfo;

/// Why an archive is no profile.
#[derive(Debug, thiserror::Error)]
pub enum ProfileError {
    /// It cannot be opened or read.
    #[error("profile {0}")]
    Archive(#[from] ArchiveError),
    /// One of its tensors would not decode.
    #[error("profile {path}: {tensor}: {error}")]
    Decode {
        /// The archive.
        path: PathBuf,
        /// Name of the tensor.
        tensor: String,
        /// What is wrong.
        error: DecodeError,
    },
    /// Not one archive.
    #[error("profile {path}: {found} archives in it, expected one of an earlier variant")]
    NotOne {
        /// The directory, or a file that is none.
        path: PathBuf,
        /// How many it has.
        found: usize,
    },
    /// It is no variant, or one of another base.
    #[error("profile {path}: {found}, expected an earlier variant of {base}")]
    OtherBase {
        /// The archive.
        path: PathBuf,
        /// What it starts from.
        found: String,
        /// The base that is given.
        base: String,
    },
    /// It lost something.
    #[error("profile {0}: packed with losses, expected an earlier variant that was packed losslessly")]
    Lossy(PathBuf),
}

/// An earlier variant, opened.
#[derive(Debug)]
pub struct Profile {
    archive: Archive,
    name: String,
    /// The tables of all differences.
    tables: TablePool,
    /// By raw bits and number in the archive, the number in `tables`.
    numbers: BTreeMap<(u8, u16), usize>,
    /// By the tensor of the base that they start from, the parts that do.
    parts: BTreeMap<(u32, u32), PartAddress>,
}

/// How the earlier variant's tensor was coded.
#[derive(Debug)]
pub struct KnownPart {
    /// What was added to the base's.
    pub product: Option<LowRank>,
    /// The differences to that; absent where there were none.
    pub differences: Option<KnownDifferences>,
}

impl Profile {
    /// Opens an archive, or a directory that holds one. It must be of a variant of `base`, and lossless.
    ///
    /// # Errors
    /// When it is not, or is damaged where a profile is read: the codes themselves are not.
    pub fn open(path: &Path, base: &Base) -> Result<Self, ProfileError> {
        let packed = packed_in(path)?;
        let [packed] = packed.as_slice() else {
            return Err(ProfileError::NotOne { path: path.to_owned(), found: packed.len() });
        };
        let archive = Archive::open(packed)?;
        let named = base.reference();
        let found = archive.index().bases.first();
        if found.is_none_or(|found| found.content_id != named.content_id) {
            let found = found.map_or("starts from no base".into(), |found| format!("starts from {}", found.name));
            return Err(ProfileError::OtherBase { path: packed.clone(), found, base: named.name });
        }
        if archive.is_lossy() {
            return Err(ProfileError::Lossy(packed.clone()));
        }
        let canonical = path.canonicalize().unwrap_or_else(|_| path.to_owned());
        let name = canonical.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let (tables, numbers, parts) = (TablePool::default(), BTreeMap::new(), BTreeMap::new());
        let mut profile = Self { archive, name, tables, numbers, parts };
        profile.gather()?;
        Ok(profile)
    }

    /// Finds the parts that start from the base, and their tables.
    fn gather(&mut self) -> Result<(), ProfileError> {
        for record in 0..self.archive.index().records.len() as u32 {
            for (part, header) in self.archive.side_information(record)?.parts.iter().enumerate() {
                let address = PartAddress { record, part: part as u32 };
                let prepared = self.prepared(address, header)?;
                let Some(based) = prepared.based() else { continue };
                let BaseTensor { base: _, file, tensor } = based.reference;
                self.parts.entry((file, tensor)).or_insert(address);
                for key in tables_of(header, &prepared).into_iter().flatten() {
                    let (archive, tables) = (&self.archive, &mut self.tables);
                    self.numbers.entry(key).or_insert_with(|| {
                        let table = archive.tables()[usize::from(key.1)].table().clone();
                        tables.add(StreamKind::Difference { raw_bits: key.0 }, class_of_table(&table), table)
                    });
                }
            }
        }
        Ok(())
    }

    fn prepared(&self, address: PartAddress, header: &PartHeader) -> Result<PreparedPart, ProfileError> {
        let tensor = self.archive.tensor(address);
        let (tables, codebooks, networks) = (self.archive.tables(), self.archive.codebooks(), self.archive.networks());
        let pools = Pools { tables, codebooks, networks };
        PreparedPart::new(tensor, header, pools, Motions::default()).map_err(|error| ProfileError::Decode {
            path: self.archive.path().to_owned(),
            tensor: tensor.name.clone(),
            error,
        })
    }

    /// What it is called where an archive says how it was packed.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The tables that its differences were coded with, by their numbers in [`KnownPart`].
    pub fn tables(&self) -> &TablePool {
        &self.tables
    }

    /// How the tensor of this type and shape was coded that starts from `reference`. `None` where there was none.
    ///
    /// # Errors
    /// When the profile cannot be read any more.
    pub fn part(&self, tensor: &TensorInfo, reference: BaseTensor) -> Result<Option<KnownPart>, ProfileError> {
        let Some(&address) = self.parts.get(&(reference.file, reference.tensor)) else { return Ok(None) };
        let before = self.archive.tensor(address);
        if (&before.dtype, &before.shape) != (&tensor.dtype, &tensor.shape) {
            return Ok(None);
        }
        let side = self.archive.side_information(address.record)?;
        let header = &side.parts[address.part as usize];
        let prepared = self.prepared(address, header)?;
        let Some(based) = prepared.based() else { return Ok(None) };
        let product = based.low_rank.clone();
        if based.difference.is_none() {
            return Ok(Some(KnownPart { product, differences: None }));
        }
        let tables = tables_of(header, &prepared);
        // A table that no run used has no number.
        let numbers = tables.into_iter().map(|key| key.and_then(|key| self.numbers.get(&key)).copied().unwrap_or(0));
        let differences = KnownDifferences::new(tensor, prepared, numbers.collect());
        Ok(differences.map(|differences| KnownPart { product, differences: Some(differences) }))
    }
}

/// For each table of a part that codes differences, the raw bits below its symbols and its number in the archive; `None` where
/// no run uses it.
fn tables_of(header: &PartHeader, part: &PreparedPart) -> Vec<Option<(u8, u16)>> {
    let difference = part.based().and_then(|based| based.difference.as_ref());
    let (Some(difference), Some(streams)) = (difference, &header.streams) else { return Vec::new() };
    let symbols = &difference.symbols;
    let mut tables = vec![None; streams.tables.len()];
    let elements = part.length_bytes() as usize / (part.dtype().bits().unwrap_or(8) as usize / 8);
    for run in 0..elements.div_ceil(symbols.run_elements) {
        let number = symbols.table_number_of_run(run);
        tables[number] = Some((symbols.stored_raw_bits(run).0 as u8, streams.tables[number]));
    }
    tables
}
