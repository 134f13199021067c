//! Archives that no encoder would write: every field of the format drawn at random within what `SPEC.md` allows, the symbols
//! too. What they decode to means nothing, but every decoder must give the same.

use std::path::{Path, PathBuf};

use mcwcfs::archive::{Archive, content_id};
use mcwcfs::codec::integers;
use mcwcfs::codec::permutation::{self, GroupedPermutation, Permutation, PermutationCoding, Symmetry};
use mcwcfs::codec::quantizer::join_code;
use mcwcfs::codec::trellis::{Trellis, multiple, quantizer_of};
use mcwcfs::format::codebook::StoredCodebook;
use mcwcfs::format::difference::{BaseTensor, BasedInfo, StoredDifference, StoredLowRank};
use mcwcfs::format::index::{BaseReference, FileEntry, Index};
use mcwcfs::format::network::{Requantization, StoredHidden, StoredKind, StoredMap, StoredNetwork};
use mcwcfs::format::part::{
    Carrier, Coding, PartHeader, PartHeaderBytes, QuantizerInfo, StoredIntegers, StoredPlacement, StoredPrediction,
    StoredPredictor, StoredTrellis, StoredVectors, SymbolStreams, TrellisTables,
};
use mcwcfs::format::record::{PartEntry, RecordEntry, SideInformation, StoredPermutation};
use mcwcfs::format::strip::{LANES, StripLayout};
use mcwcfs::format::table::Table;
use mcwcfs::format::units::UnitsInfo;
use mcwcfs::materialize::{EngineChoice, MaterializeOptions, Materializer};
use sha2::{Digest, Sha256};

use super::archives::open_with_bases;
use super::{Random, Tensor, safetensors_with};

/// One archive; another seed, another archive.
pub fn write_random_archive(seed: u64, path: &Path) {
    let mut writer = ArchiveWriter::new(seed);
    writer.draw();
    finish(&mut writer, path);
}

/// A variant and its base, both drawn at random, in one directory; the path of the variant. It has the same tensors, but for
/// the number of their rows and what they are.
pub fn write_random_variant(seed: u64, directory: &Path) -> PathBuf {
    let (base_path, path) =
        (directory.join(format!("base-{seed}.mcwc")), directory.join(format!("variant-{seed}.mcwc")));
    let mut base = ArchiveWriter::new(seed);
    let mut variant = ArchiveWriter::new(seed + 1000);
    let (mut parts, mut based) = (Vec::new(), Vec::new());
    for (number, dtype) in ["F32", "BF16", "F16", "U8", "F8_E4M3", "F32", "BF16", "F64"].into_iter().enumerate() {
        let shape = [4 + base.random.below(30), 1 + base.random.below(40)];
        let tensor = base.tensor(dtype, &shape);
        parts.push(base.raw(tensor));
        let rows = if dtype != "F64" && variant.random.below(3) == 0 { 1 + variant.random.below(40) } else { shape[0] };
        let own = variant.tensor(dtype, &[rows, shape[1]]);
        based.push(variant.based(own, number, rows == shape[0], dtype));
    }
    base.record(None, 0, None, None, parts);
    variant.record(None, 0, None, None, based);
    finish(&mut base, &base_path);
    let content_id = Archive::open(&base_path).expect("just written").content_id();
    variant.bases = vec![BaseReference { content_id, name: "base".into() }];
    finish(&mut variant, &path);
    path
}

/// Writes an archive with the digest of what it decodes to, which is known once it has been decoded.
fn finish(writer: &mut ArchiveWriter, path: &Path) {
    std::fs::write(path, writer.bytes(&[])).expect("an archive");
    let archive = open_with_bases(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let mut decoded = vec![0; archive.files()[0].length_bytes as usize];
    let options =
        MaterializeOptions { cache_bytes: 1 << 24, engine: EngineChoice::Reference, ..MaterializeOptions::default() };
    let read = Materializer::new(options).read(&archive, 0, 0, &mut decoded);
    read.unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    std::fs::write(path, writer.bytes(&decoded)).expect("an archive");
}

struct ArchiveWriter {
    random: Random,
    tables: Vec<Table>,
    /// Two and two with codewords of one length.
    codebooks: Vec<StoredCodebook>,
    networks: Vec<StoredNetwork>,
    tensors: Vec<Tensor>,
    records: Vec<RecordEntry>,
    layers: u32,
    has_units: bool,
    has_column_scales: bool,
    body: Vec<u8>,
    bases: Vec<BaseReference>,
}

/// A part of a record being drawn.
struct Part {
    tensor: usize,
    header: PartHeader,
    body: Vec<u8>,
}

impl ArchiveWriter {
    fn new(seed: u64) -> Self {
        let mut random = Random::new(seed);
        let tables = (0..6).map(|_| random.table()).collect();
        let mut codebooks = Vec::new();
        if random.chance() {
            for elements in [2 + random.below(3), 2 + random.below(15)] {
                codebooks.extend([(); 2].map(|()| random.codebook(elements)));
            }
        }
        let networks = (0..random.below(3)).map(|_| random.network()).collect();
        Self {
            random,
            tables,
            codebooks,
            networks,
            tensors: Vec::new(),
            records: Vec::new(),
            layers: 0,
            has_units: false,
            has_column_scales: false,
            body: Vec::new(),
            bases: Vec::new(),
        }
    }

    /// A chain of records, and one outside the layers.
    fn draw(&mut self) {
        let random = &mut self.random;
        let symmetry = Symmetry { groups: 1 + random.below(6) as u32, members: 1 + random.below(3) as u32 };
        let placement = StoredPlacement {
            axis: random.below(3) as u8,
            repeat: 1 + random.below(3) as u32,
            per_member: random.chance(),
            unit: 1 + random.below(4) as u32,
        };
        let blocks = symmetry.groups * if placement.per_member { symmetry.members } else { 1 };
        let mut shape = [1 + random.below(2), 1 + random.below(24), 1 + random.below(24)];
        shape[usize::from(placement.axis)] = (placement.repeat * blocks * placement.unit) as usize;
        let dtype = *random.pick(&["F32", "F16", "BF16"]);
        self.layers = 1 + self.random.below(4) as u32;
        let mut permutation = None;
        for layer in 0..self.layers {
            let below = self.records.len().checked_sub(1).map(|below| below as u32);
            let weight = self.tensor(dtype, &shape);
            let moved = self.permutation(symmetry, &mut permutation);
            let quantized = self.quantized(weight, layer, moved.as_ref().map(|_| placement));
            // The reference of the part above has the same number.
            self.record(Some(layer), 1, below, moved, vec![quantized]);
        }
        let mut parts = Vec::new();
        for dtype in ["F64", "U8", "F32", "BF16", "I64", "NF7"] {
            let rows = if dtype == "I64" { 0 } else { 1 + self.random.below(8) };
            let tensor = self.tensor(dtype, &[rows, 37]);
            parts.push(match self.random.below(3) {
                0 => self.raw(tensor),
                1 if dtype != "NF7" => self.split(tensor),
                _ => self.units(tensor),
            });
        }
        self.record(None, 0, None, None, parts);
    }

    fn tensor(&mut self, dtype: &str, shape: &[usize]) -> usize {
        let bytes = match dtype {
            "F64" | "I64" => 8,
            "F32" => 4,
            "F16" | "BF16" => 2,
            _ => 1,
        };
        let data = vec![0; bytes * shape.iter().product::<usize>()];
        self.tensors.push(Tensor::raw(&format!("tensor {}", self.tensors.len()), dtype, shape, data));
        self.tensors.len() - 1
    }

    fn elements(&self, tensor: usize) -> usize {
        self.tensors[tensor].shape.iter().product()
    }

    /// Draws a permutation, or none; `before` is the one of the record below.
    fn permutation(
        &mut self,
        symmetry: Symmetry,
        before: &mut Option<GroupedPermutation>,
    ) -> Option<StoredPermutation> {
        let random = &mut self.random;
        if random.below(4) == 0 {
            *before = None;
            return None;
        }
        let mut order = |count: u32| {
            let entries = random.permutation(count as usize).into_iter().map(|entry| entry as u32).collect();
            Permutation::new(entries).expect("a shuffle")
        };
        let outer = order(symmetry.groups);
        let inner = (0..symmetry.groups).map(|_| order(symmetry.members)).collect();
        let drawn = GroupedPermutation::new(outer, inner).expect("one inner permutation per group");
        let codings = [PermutationCoding::Raw, PermutationCoding::Uniform, PermutationCoding::Delta];
        let coded = permutation::encode(&drawn, before.as_ref(), *random.pick(&codings));
        *before = Some(drawn);
        Some(StoredPermutation { groups: symmetry.groups, members: symmetry.members, coded })
    }

    fn raw(&mut self, tensor: usize) -> Part {
        let body = self.random.bytes(self.tensors[tensor].data.len());
        let strip_crcs = body.chunks(1 << 17).map(crc32c::crc32c).collect();
        let header = PartHeader { coding: Coding::Raw, streams: None, strip_crcs, cost: PartHeaderBytes::default() };
        Part { tensor, header, body }
    }

    fn split(&mut self, tensor: usize) -> Part {
        let own_bits = match self.elements(tensor) {
            0 => 16,
            elements => 8 * self.tensors[tensor].data.len() / elements,
        };
        let carrier = match self.tensors[tensor].dtype.as_str() {
            "F32" => *self.random.pick(&[Carrier::Own, Carrier::Bf16, Carrier::F16]),
            _ => Carrier::Own,
        };
        let bits = if carrier == Carrier::Own { own_bits } else { 16 };
        let raw_bits = 1 + self.random.below(bits.min(56)) as u8;
        let zeros = self.random.chance();
        let zero_bits = |run: usize| if zeros { run * 7 % usize::from(raw_bits) } else { 0 };
        let (streams, strip_crcs, body) =
            self.strips(self.elements(tensor), raw_bits.into(), &zero_bits, bits / 8, None, 1);
        let runs = self.elements(tensor).div_ceil(streams.run_elements as usize);
        let of_runs: Vec<i32> = (0..runs).map(|run| zero_bits(run) as i32).collect();
        let zero_bits = zeros.then(|| integers::encode(&of_runs));
        let coding = Coding::Split { carrier, raw_bits, zero_bits };
        let header = PartHeader { coding, streams: Some(streams), strip_crcs, cost: PartHeaderBytes::default() };
        Part { tensor, header, body }
    }

    fn units(&mut self, tensor: usize) -> Part {
        let bytes = self.tensors[tensor].data.len();
        let random = &mut self.random;
        let unit_bits = *random.pick(&[4, 8, 16, 32, 64]);
        let unit_bits = if (8 * bytes).is_multiple_of(unit_bits) { unit_bits } else { 4 };
        let values = if random.chance() { 0 } else { 1 + random.below(61) };
        let raw_bits = if values > 0 || random.chance() { 0 } else { random.below(unit_bits.min(56) + 1) as u8 };
        let values = (0..values).map(|_| random.next_u64() >> (64 - unit_bits)).collect();
        let units = UnitsInfo { unit_bits: unit_bits as u8, raw_bits, has_differences: random.chance(), values };
        self.has_units = true;
        let pairs = if unit_bits == 4 { 2 } else { 1 };
        let count = 8 * bytes / unit_bits;
        let (streams, strip_crcs, body) =
            self.strips(count, raw_bits.into(), &|_| 0, unit_bits.div_ceil(8), None, pairs);
        let coding = Coding::Units(units);
        let header = PartHeader { coding, streams: Some(streams), strip_crcs, cost: PartHeaderBytes::default() };
        Part { tensor, header, body }
    }

    /// A part that starts from the base's tensor of the same number; all of it where `is_whole`.
    fn based(&mut self, tensor: usize, base_tensor: usize, is_whole: bool, dtype: &str) -> Part {
        let elements = self.elements(tensor);
        let (rows, columns) = (self.tensors[tensor].shape[0], self.tensors[tensor].shape[1]);
        let bits = 8 * self.tensors[tensor].data.len() / elements;
        let random = &mut self.random;
        let has_difference = bits < 64 && (!is_whole || random.below(4) > 0);
        let is_float = ["F32", "BF16", "F16"].contains(&dtype);
        let low_rank = (is_float && random.chance()).then(|| {
            let rank = 1 + random.below(rows.min(columns).min(5));
            let factor = |random: &mut Random, count| random.integers(count, 2046);
            StoredLowRank {
                rank: rank as u32,
                scale: random.normal() * 1e-8,
                left: factor(random, rows * rank),
                right: factor(random, rank * columns),
            }
        });
        let reference = BaseTensor { base: 0, file: 0, tensor: base_tensor as u32 };
        let mut info = BasedInfo { reference, low_rank, difference: None };
        if is_float && random.below(3) == 0 {
            let mut part = self.quantized(tensor, 0, None);
            part.header.coding = match part.header.coding {
                Coding::Quantized(info) if info.vectors.is_none() => Coding::QuantizedFromBase(reference, info),
                other => other,
            };
            return part;
        }
        if !has_difference {
            let cost = PartHeaderBytes::default();
            let header = PartHeader { coding: Coding::Based(info), streams: None, strip_crcs: vec![], cost };
            return Part { tensor, header, body: Vec::new() };
        }
        let table_raw_bits: Vec<usize> = (0..3).map(|_| random.below(bits + 1)).collect();
        let most = table_raw_bits.iter().copied().max().expect("three");
        let class_row = 1 + random.below(2 * columns);
        let class_rows = elements.div_ceil(class_row);
        let reach = 1 << random.below(9);
        let class_offsets: Vec<i32> = (0..class_rows).map(|_| random.below(reach) as i32).collect();
        info.difference = Some(StoredDifference {
            zero_bits: if random.chance() { 0 } else { random.below(bits) as u8 },
            class_shift: random.below(bits) as u8,
            class_row: class_row as u32,
            class_offsets: integers::encode(&class_offsets),
            table_raw_bits: StoredIntegers::default(),
        });
        let mut used = Vec::new();
        let (mut streams, strip_crcs, body) =
            self.strips_of(elements, most, bits / 8, None, 1, &mut |tables: &[i32], count| {
                used = table_raw_bits[..count].to_vec();
                tables.iter().map(|&table| most - table_raw_bits[table as usize]).collect()
            });
        let difference = info.difference.as_mut().expect("just made");
        difference.table_raw_bits = integers::encode(&used.iter().map(|&bits| bits as i32).collect::<Vec<_>>());
        // The most of the tables in use may be less than the most of the three.
        let tables = streams.tables.len();
        if tables > 1 {
            let numbers = integers::decode(
                &streams.table_of_run,
                elements.div_ceil(streams.run_elements as usize) as u64,
                0,
                tables as i32 - 1,
            );
            let numbers = numbers.expect("just encoded");
            let mut before = 0;
            let steps: Vec<i32> = (0..elements.div_ceil(streams.run_elements as usize))
                .map(|run| numbers.get(run) - std::mem::replace(&mut before, numbers.get(run)))
                .collect();
            streams.table_of_run = integers::encode(&steps);
        }
        let coding = Coding::Based(info);
        let header = PartHeader { coding, streams: Some(streams), strip_crcs, cost: PartHeaderBytes::default() };
        Part { tensor, header, body }
    }

    /// `records_below` are those that a prediction may reach.
    fn quantized(&mut self, tensor: usize, records_below: u32, placement: Option<StoredPlacement>) -> Part {
        let has_vectors = !self.codebooks.is_empty() && self.random.below(3) == 0;
        let pair = 2 * self.random.below(2) as u16;
        let vectors = has_vectors.then(|| StoredVectors { codebooks: [pair, pair + self.random.below(2) as u16] });
        let tables = *self.random.pick(&[None, Some(TrellisTables::Shared), Some(TrellisTables::Pairs)]);
        let state_bits = 3 + self.random.below(6) as u8;
        let trellis = tables.filter(|_| !has_vectors).map(|tables| StoredTrellis { tables, state_bits });
        let raw_bits = if has_vectors || self.random.chance() { 0 } else { self.random.below(9) as u8 };
        let (streams, strip_crcs, body) = match vectors {
            Some(vectors) => self.vector_strips(self.elements(tensor), vectors),
            None => self.strips(self.elements(tensor), raw_bits.into(), &|_| 0, 2, trellis, 1),
        };
        let runs = self.elements(tensor).div_ceil(streams.run_elements as usize);
        let random = &mut self.random;
        let scales = random.chance().then(|| random.integers(runs, 40));
        let means = random.chance().then(|| (random.normal() * 0.01, random.integers(runs, 100)));
        let column_scales = random.chance().then(|| random.integers(streams.run_elements as usize, 40));
        self.has_column_scales |= column_scales.is_some();
        let predicted = records_below > 0 && random.below(5) > 0;
        let (shape, networks) = (&self.tensors[tensor].shape, &self.networks);
        let prediction = predicted.then(|| StoredPrediction {
            reference_part: 0,
            placement: placement.filter(|_| random.below(4) > 0),
            predictor: match random.below(6) {
                0 => StoredPredictor::ScaledCopy { gain: random.normal() },
                1 => random.vectors(shape),
                2..=4 if !networks.is_empty() => random.use_of(networks, records_below),
                _ => StoredPredictor::RowAffine {
                    gain_step: random.normal() * 0.01,
                    offset_step: random.normal() * 0.01,
                    gains: random.integers(runs, 200),
                    offsets: random.integers(runs, 100),
                },
            },
        });
        let prediction = prediction.map(|prediction| match prediction.predictor {
            StoredPredictor::MotionVectors { .. } => StoredPrediction { placement: None, ..prediction },
            _ => prediction,
        });
        let step = (random.normal() * 0.01).abs() + 1e-6;
        let info = QuantizerInfo { step, raw_bits, trellis, vectors, scales, means, column_scales, prediction };
        let coding = Coding::Quantized(info);
        let header = PartHeader { coding, streams: Some(streams), strip_crcs, cost: PartHeaderBytes::default() };
        Part { tensor, header, body }
    }

    /// Indices of codewords, which may be any bits.
    fn vector_strips(&mut self, elements: usize, vectors: StoredVectors) -> (SymbolStreams, Vec<u32>, Vec<u8>) {
        let [first, second] = vectors.codebooks.map(|number| &self.codebooks[usize::from(number)]);
        let (vector, bits) = (usize::from(first.elements), usize::from(first.index_bits + second.index_bits));
        let random = &mut self.random;
        let (run_elements, runs_per_strip) = (1 + random.below(150), 1 + random.below(9));
        let (mut crcs, mut body) = (Vec::new(), Vec::new());
        let runs: Vec<usize> =
            (0..elements).step_by(run_elements).map(|start| run_elements.min(elements - start)).collect();
        for strip in runs.chunks(runs_per_strip) {
            let bytes: usize = strip.iter().map(|run| (run.div_ceil(vector) * bits).div_ceil(8)).sum();
            let bytes = random.bytes(bytes);
            crcs.push(crc32c::crc32c(&bytes));
            body.extend(bytes);
        }
        let (run_elements, runs_per_strip) = (run_elements as u32, runs_per_strip as u32);
        (SymbolStreams { run_elements, runs_per_strip, ..SymbolStreams::default() }, crcs, body)
    }

    /// Symbols drawn at random, their strips, and what the header says of them.
    fn strips(
        &mut self,
        elements: usize,
        raw_bits: usize,
        zero_bits: &dyn Fn(usize) -> usize,
        exception_value_bytes: usize,
        trellis: Option<StoredTrellis>,
        run_multiple: usize,
    ) -> (SymbolStreams, Vec<u32>, Vec<u8>) {
        let of_runs = &mut |tables: &[i32], _| (0..tables.len()).map(zero_bits).collect();
        self.strips_of(elements, raw_bits, exception_value_bytes, trellis, run_multiple, of_runs)
    }

    /// The same, where the low bits that are not stored may depend on the table of each run; also told is how many there are.
    fn strips_of(
        &mut self,
        elements: usize,
        raw_bits: usize,
        exception_value_bytes: usize,
        trellis: Option<StoredTrellis>,
        run_multiple: usize,
        zero_bits_of_runs: &mut dyn FnMut(&[i32], usize) -> Vec<usize>,
    ) -> (SymbolStreams, Vec<u32>, Vec<u8>) {
        let random = &mut self.random;
        let pairs = trellis.is_some_and(|trellis| trellis.tables == TrellisTables::Pairs);
        let trellis = trellis.map(|trellis| Trellis::new(trellis.state_bits).expect("in range"));
        let numbers = (1 + random.below(3)) * if pairs { 2 } else { 1 };
        let tables: Vec<u16> = (0..numbers).map(|_| random.below(self.tables.len()) as u16).collect();
        let run_elements = run_multiple * (1 + random.below(150));
        let runs_per_strip = 1 + random.below(9);
        let lanes = 1 << random.below(6);
        let runs = elements.div_ceil(run_elements);
        let choices = numbers / if pairs { 2 } else { 1 };
        let table_of_run: Vec<i32> = (0..runs).map(|_| random.below(choices) as i32).collect();
        let zero_bits = zero_bits_of_runs(&table_of_run, choices);
        let (mut words, mut exceptions, mut crcs, mut body) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for strip in 0..runs.div_ceil(runs_per_strip) {
            let first = strip * runs_per_strip * run_elements;
            let symbols = (runs_per_strip * run_elements).min(elements - first);
            let mut coded = Vec::with_capacity(symbols);
            let raw: Vec<u64> = (0..symbols).map(|_| random.next_u64() & (u64::MAX >> 1 >> (63 - raw_bits))).collect();
            let mut states = [0; LANES];
            for (symbol, &raw) in raw.iter().enumerate() {
                let choice = table_of_run[strip * runs_per_strip + symbol / run_elements] as usize;
                let lane = symbol % run_elements % lanes;
                let in_use = quantizer_of(states[lane]);
                let number = if pairs { tables[2 * choice + usize::from(in_use)] } else { tables[choice] };
                let table = &self.tables[usize::from(number)];
                let position = random.below(table.codes.len());
                if let Some(trellis) = trellis {
                    let code = join_code(table.codes[position], raw as u32, raw_bits as u32);
                    states[lane] = trellis.next_state(states[lane], multiple(code, in_use));
                }
                coded.push((lane, table, position));
            }
            let mut stored_raw = Vec::new();
            for (run, raw) in raw.chunks(run_elements).enumerate() {
                write_raw(raw, raw_bits, zero_bits[strip * runs_per_strip + run], &mut stored_raw);
            }
            let (mut bytes, strip_words) = encode_lanes(&coded, lanes);
            let positions: Vec<u16> = (0..symbols as u16).filter(|_| random.below(200) == 0).collect();
            let layout = StripLayout {
                symbols,
                run_elements,
                lanes,
                words: strip_words,
                raw_bytes: stored_raw.len(),
                exceptions: positions.len(),
                exception_value_bytes,
            };
            bytes.extend(stored_raw);
            bytes.extend(positions.iter().flat_map(|position| position.to_le_bytes()));
            bytes.extend(random.bytes(exception_value_bytes * positions.len()));
            assert_eq!(bytes.len(), layout.bytes(), "the pieces of a strip");
            words.push(strip_words as i32);
            exceptions.push(positions.len() as i32);
            crcs.push(crc32c::crc32c(&bytes));
            body.extend(bytes);
        }
        let streams = SymbolStreams {
            run_elements: run_elements as u32,
            runs_per_strip: runs_per_strip as u32,
            lanes: lanes as u8,
            table_of_run: if numbers > 1 { integers::encode(&table_of_run) } else { StoredIntegers::default() },
            tables,
            strip_words: integers::encode(&words),
            strip_exceptions: integers::encode(&exceptions),
        };
        (streams, crcs, body)
    }

    fn record(
        &mut self,
        layer: Option<u32>,
        block_type: u8,
        reference: Option<u32>,
        permutation: Option<StoredPermutation>,
        parts: Vec<Part>,
    ) {
        let entries = parts.iter().map(|part| PartEntry {
            file: 0,
            tensor: part.tensor as u32,
            body_bytes: part.body.len() as u64,
        });
        let entries = entries.collect();
        let (headers, bodies): (Vec<_>, Vec<_>) = parts.into_iter().map(|part| (part.header, part.body)).unzip();
        let side = SideInformation { permutation, parts: headers, permutation_bytes: 0 }.write();
        self.records.push(RecordEntry {
            layer,
            block_type,
            reference,
            side_bytes: side.len() as u64,
            side_crc: crc32c::crc32c(&side),
            parts: entries,
        });
        self.body.extend(side);
        self.body.extend(bodies.concat());
    }

    /// The archive, with the digests of what it decodes to.
    fn bytes(&mut self, decoded: &[u8]) -> Vec<u8> {
        let order: Vec<usize> = (0..self.tensors.len()).rev().collect();
        let mut header = safetensors_with(&self.tensors, &order, &[]);
        let data: usize = self.tensors.iter().map(|tensor| tensor.data.len()).sum();
        header.truncate(header.len() - data);
        let (decoded_sha256, source_sha256) = (Sha256::digest(decoded).into(), [0; 32]);
        let decoded_blake3 = self.layers.is_multiple_of(2).then(|| blake3::hash(decoded).into());
        let name = "model.safetensors".into();
        let file = FileEntry { name, header, decoded_sha256, source_sha256, decoded_blake3 };
        let index = Index {
            architecture: "random".into(),
            layers: self.layers,
            keyframe_interval: 4,
            content_id: content_id(std::iter::once(decoded_sha256)),
            files: vec![file],
            tables: self.tables.clone(),
            codebooks: self.codebooks.clone(),
            networks: self.networks.clone(),
            block_types: vec!["global".into(), "ffn".into()],
            records: self.records.clone(),
            bases: self.bases.clone(),
            has_units: self.has_units,
            has_predictors: true,
            has_column_scales: self.has_column_scales,
            provenance: vec![("tool".into(), "dice".into())],
        };
        let (preamble, stored) = index.write(64 + self.body.len() as u64);
        [preamble.write(), self.body.clone(), stored].concat()
    }
}

impl Random {
    fn chance(&mut self) -> bool {
        self.below(2) == 0
    }

    fn pick<'a, T>(&mut self, items: &'a [T]) -> &'a T {
        &items[self.below(items.len())]
    }

    fn integers(&mut self, count: usize, reach: i32) -> StoredIntegers {
        let reach = 1 + self.below(reach as usize);
        integers::encode(&(0..count).map(|_| self.below(2 * reach + 1) as i32 - reach as i32).collect::<Vec<_>>())
    }

    /// A codebook of finite numbers.
    fn network(&mut self) -> StoredNetwork {
        let (unit, contexts, width, hidden) =
            (1 + self.below(9), 1 + self.below(3).min(1), 1 + self.below(7), self.below(2) * (1 + self.below(9)));
        let to_latent = self.requantization();
        StoredNetwork {
            unit: unit as u16,
            contexts: contexts as u8,
            width: width as u16,
            to_latent,
            hidden: (hidden > 0).then(|| StoredHidden {
                up: self.map(hidden, width),
                to_hidden: self.requantization(),
                activation: self.eight_bits(256),
                down: self.map(width, hidden),
                to_latent: self.requantization(),
            }),
            kinds: (0..1 + self.below(3))
                .map(|_| StoredKind { input: self.map(width, contexts * unit), output: self.map(unit, width) })
                .collect(),
            layers: (0..self.below(3)).map(|_| self.map(width, 0).biases).collect(),
        }
    }

    fn requantization(&mut self) -> Requantization {
        Requantization { multiplier: 1 + self.below(65_535) as u16, shift: 12 + self.below(14) as u8 }
    }

    fn eight_bits(&mut self, count: usize) -> Vec<i8> {
        self.bytes(count).into_iter().map(u8::cast_signed).collect()
    }

    fn map(&mut self, rows: usize, columns: usize) -> StoredMap {
        let biases = (0..rows).map(|_| self.below(2000) as i32 - 1000).collect();
        StoredMap { weights: self.eight_bits(rows * columns), biases }
    }

    /// A prediction by one of the networks.
    fn use_of(&mut self, networks: &[StoredNetwork], records_below: u32) -> StoredPredictor {
        let number = self.below(networks.len());
        let network = &networks[number];
        let layers = network.layers.len();
        let has_second = network.contexts == 2 && records_below > 1 && self.below(4) > 0;
        StoredPredictor::Network {
            network: number as u16,
            kind: self.below(network.kinds.len()) as u16,
            layer: (layers > 0 && self.chance()).then(|| self.below(layers) as u16),
            input_scale: self.normal() * 1000.0,
            output_scale: self.normal() * 1e-5,
            second_part: has_second.then_some(0),
        }
    }

    /// Vectors along some axis of a tensor.
    fn vectors(&mut self, shape: &[usize]) -> StoredPredictor {
        let axis = self.below(shape.len());
        let counts: Vec<i32> = (0..shape[axis]).map(|_| self.below(5) as i32).collect();
        let total = counts.iter().sum::<i32>() as usize;
        let sources: Vec<i32> = (0..total).map(|_| self.below(shape[axis]) as i32).collect();
        StoredPredictor::MotionVectors {
            axis: axis as u8,
            gain_step: self.normal() * 0.1,
            counts: integers::encode(&counts),
            sources: integers::encode(&sources),
            gains: self.integers(total, 9),
        }
    }

    fn codebook(&mut self, elements: usize) -> StoredCodebook {
        let index_bits = 1 + self.below(6);
        let values = self.normals(elements << index_bits, 1.0).into_iter();
        let values = values.map(|value| half::f16::from_f32(value).to_bits()).collect();
        StoredCodebook { elements: elements as u8, index_bits: index_bits as u8, values }
    }

    /// A table that keeps the depth rule: boundaries drawn one by one, at most three in a bucket.
    fn table(&mut self) -> Table {
        let positions = 2 + self.below(60);
        let mut in_bucket = [0; 128];
        let mut boundaries = vec![0, 4096];
        while boundaries.len() <= positions {
            let boundary = 1 + self.below(4095);
            let inside = !boundary.is_multiple_of(32);
            if !boundaries.contains(&boundary) && (!inside || in_bucket[boundary / 32] < 3) {
                in_bucket[boundary / 32] += u8::from(inside);
                boundaries.push(boundary);
            }
        }
        boundaries.sort_unstable();
        let reach = *self.pick(&[positions, 4 * positions, 32_767]) as i32;
        let mut codes: Vec<i16> = Vec::new();
        while codes.len() < positions {
            let code = (self.below(2 * reach as usize + 1) as i32 - reach) as i16;
            if !codes.contains(&code) {
                codes.push(code);
            }
        }
        Table {
            codes,
            frequencies: boundaries.windows(2).map(|pair| (pair[1] - pair[0]) as u16).collect(),
            point_offsets: match self.chance() {
                true => self.bytes(positions).into_iter().map(|byte| byte as i8).collect(),
                false => Vec::new(),
            },
        }
    }
}

/// States and words of symbols given as lane, table and position, and how many words: the coder of section 6 run backwards.
fn encode_lanes(symbols: &[(usize, &Table, usize)], lanes: usize) -> (Vec<u8>, usize) {
    let mut states = vec![1_u32 << 16; lanes];
    let mut words: Vec<u16> = Vec::new();
    for &(lane, table, position) in symbols.iter().rev() {
        let frequency = u32::from(table.frequencies[position]);
        let first: u32 = table.frequencies[..position].iter().copied().map(u32::from).sum();
        let state = &mut states[lane];
        if *state >= frequency << 20 {
            words.push(*state as u16);
            *state >>= 16;
        }
        *state = ((*state / frequency) << 12) + *state % frequency + first;
    }
    let mut bytes: Vec<u8> = states.iter().flat_map(|state| state.to_le_bytes()).collect();
    bytes.extend(words.iter().rev().flat_map(|word| word.to_le_bytes()));
    (bytes, words.len())
}

/// Byte planes of a run, then its bit planes, the absent symbols' bits left zero, without the lowest `zeros` bits.
fn write_raw(raw: &[u64], raw_bits: usize, zeros: usize, bytes: &mut Vec<u8>) {
    let stored: Vec<u64> = raw.iter().map(|raw| raw >> zeros).collect();
    let bits = raw_bits - zeros;
    for plane in 0..bits / 8 {
        bytes.extend(stored.iter().map(|&raw| (raw >> (8 * plane)) as u8));
    }
    for group in stored.chunks(LANES) {
        for bit in bits / 8 * 8..bits {
            let of_symbol = |(lane, &raw): (usize, &u64)| ((raw >> bit & 1) as u32) << lane;
            bytes.extend(group.iter().enumerate().map(of_symbol).sum::<u32>().to_le_bytes());
        }
    }
}
