//! Networks of learned predictors, in integers (SPEC.md section 5.2; Eqs. 75-80, F.1).

use super::bytes::{Reader, Writer};
use super::error::FormatError;
use super::limits;

/// How a sum of products becomes eight bits: times a multiplier, shifted right with rounding, cut to -127 to 127.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Requantization {
    /// 1 to 65,535.
    pub multiplier: u16,
    /// Bits shifted out.
    pub shift: u8,
}

impl Requantization {
    fn parse(reader: &mut Reader<'_>) -> Result<Self, FormatError> {
        let offset = reader.position();
        let multiplier = reader.u16("network multiplier")?;
        if multiplier == 0 {
            return Err(reader.invalid("network multiplier", offset, 0, "1 to 65535"));
        }
        let offset = reader.position();
        let shift = reader.u8("network shift")?;
        if !limits::NETWORK_SHIFT.contains(&shift) {
            return Err(reader.invalid("network shift", offset, shift, "1 to 40"));
        }
        Ok(Self { multiplier, shift })
    }

    fn write(self, writer: &mut Writer) {
        writer.u16(self.multiplier);
        writer.u8(self.shift);
    }
}

/// A linear map and what is added to its sums.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct StoredMap {
    /// `[rows, columns]`.
    pub weights: Vec<i8>,
    /// `[rows]`.
    pub biases: Vec<i32>,
}

impl StoredMap {
    fn parse(reader: &mut Reader<'_>, rows: usize, columns: usize) -> Result<Self, FormatError> {
        let weights = reader.take("network weights", (rows * columns) as u64)?;
        let weights = weights.iter().map(|&byte| byte.cast_signed()).collect();
        Ok(Self { weights, biases: parse_biases(reader, rows)? })
    }

    fn write(&self, writer: &mut Writer) {
        let bytes: Vec<u8> = self.weights.iter().map(|weight| weight.cast_unsigned()).collect();
        writer.raw(&bytes);
        write_biases(&self.biases, writer);
    }
}

/// The hidden layer between latent elements (Eq. 79).
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct StoredHidden {
    /// `[hidden, width]`.
    pub up: StoredMap,
    /// Sums of `up` to places in the table.
    pub to_hidden: Requantization,
    /// The nonlinearity, 256 values: of -128 first.
    pub activation: Vec<i8>,
    /// `[width, hidden]`.
    pub down: StoredMap,
    /// Sums of `down` to what is added to the latent elements.
    pub to_latent: Requantization,
}

/// What a network has for one kind of tensor (Eqs. 76, 80).
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct StoredKind {
    /// `[width, contexts * unit]`; the embedding of the kind is in its biases.
    pub input: StoredMap,
    /// `[unit, width]`.
    pub output: StoredMap,
}

/// One network.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct StoredNetwork {
    /// Elements predicted at once.
    pub unit: u16,
    /// Layers below that it looks at: 1 or 2.
    pub contexts: u8,
    /// Latent elements.
    pub width: u16,
    /// Sums of the input map to latent elements.
    pub to_latent: Requantization,
    /// Absent where the network is linear.
    pub hidden: Option<StoredHidden>,
    /// Kinds of tensors, which parts refer to by number.
    pub kinds: Vec<StoredKind>,
    /// Embeddings of layers, each `[width]`, added to sums of the input map (Eq. 77).
    pub layers: Vec<Vec<i32>>,
}

impl StoredNetwork {
    /// Reads one network.
    pub fn parse(reader: &mut Reader<'_>) -> Result<Self, FormatError> {
        let unit = positive(reader, "network unit", limits::NETWORK_UNIT)?;
        let offset = reader.position();
        let contexts = reader.u8("network contexts")?;
        if !(1..=2).contains(&contexts) {
            return Err(reader.invalid("network contexts", offset, contexts, "1 or 2"));
        }
        let width = positive(reader, "network width", limits::NETWORK_WIDTH)?;
        let hidden = reader.varint("network hidden", limits::NETWORK_HIDDEN)? as usize;
        let to_latent = Requantization::parse(reader)?;
        let hidden = match hidden {
            0 => None,
            _ => Some(StoredHidden {
                up: StoredMap::parse(reader, hidden, width)?,
                to_hidden: Requantization::parse(reader)?,
                activation: reader.take("network activation", 256)?.iter().map(|&byte| byte.cast_signed()).collect(),
                down: StoredMap::parse(reader, width, hidden)?,
                to_latent: Requantization::parse(reader)?,
            }),
        };
        let kinds = reader.count("network kinds", limits::NETWORK_KINDS)?;
        let kinds = (0..kinds).map(|_| {
            let input = StoredMap::parse(reader, width, usize::from(contexts) * unit)?;
            Ok(StoredKind { input, output: StoredMap::parse(reader, unit, width)? })
        });
        let kinds = kinds.collect::<Result<Vec<_>, FormatError>>()?;
        let layers = reader.count("network layers", limits::NETWORK_LAYERS)?;
        let layers = (0..layers).map(|_| parse_biases(reader, width)).collect::<Result<_, _>>()?;
        Ok(Self { unit: unit as u16, contexts, width: width as u16, to_latent, hidden, kinds, layers })
    }

    /// Writes the network.
    pub fn write(&self, writer: &mut Writer) {
        writer.varint(self.unit.into());
        writer.u8(self.contexts);
        writer.varint(self.width.into());
        writer.varint(self.hidden.as_ref().map_or(0, |hidden| hidden.up.biases.len() as u64));
        self.to_latent.write(writer);
        if let Some(hidden) = &self.hidden {
            hidden.up.write(writer);
            hidden.to_hidden.write(writer);
            let activation: Vec<u8> = hidden.activation.iter().map(|value| value.cast_unsigned()).collect();
            writer.raw(&activation);
            hidden.down.write(writer);
            hidden.to_latent.write(writer);
        }
        writer.varint(self.kinds.len() as u64);
        for kind in &self.kinds {
            kind.input.write(writer);
            kind.output.write(writer);
        }
        writer.varint(self.layers.len() as u64);
        for layer in &self.layers {
            write_biases(layer, writer);
        }
    }
}

fn positive(reader: &mut Reader<'_>, field: &'static str, limit: u64) -> Result<usize, FormatError> {
    let offset = reader.position();
    match reader.varint(field, limit)? {
        0 => Err(reader.invalid(field, offset, 0, format!("1 to {limit}"))),
        value => Ok(value as usize),
    }
}

fn parse_biases(reader: &mut Reader<'_>, count: usize) -> Result<Vec<i32>, FormatError> {
    let offset = reader.position();
    let bytes = reader.take("network biases", 4 * count as u64)?;
    let biases: Vec<i32> = bytes.as_chunks().0.iter().map(|&bytes| i32::from_le_bytes(bytes)).collect();
    let largest = limits::NETWORK_BIAS;
    match biases.iter().find(|bias| !(-largest..=largest).contains(*bias)) {
        Some(bias) => Err(reader.invalid("network biases", offset, bias, format!("{} to {largest}", -largest))),
        None => Ok(biases),
    }
}

fn write_biases(biases: &[i32], writer: &mut Writer) {
    biases.iter().for_each(|bias| writer.raw(&bias.to_le_bytes()));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(rows: usize, columns: usize) -> StoredMap {
        let weights = (0..rows * columns).map(|at| (at as i8).wrapping_mul(37)).collect();
        StoredMap { weights, biases: (0..rows as i32).map(|row| 1 - 1000 * row).collect() }
    }

    fn network(hidden: bool) -> StoredNetwork {
        let requantization = Requantization { multiplier: 700, shift: 12 };
        StoredNetwork {
            unit: 3,
            contexts: 2,
            width: 4,
            to_latent: requantization,
            hidden: hidden.then(|| StoredHidden {
                up: map(5, 4),
                to_hidden: requantization,
                activation: (-128..=127).collect(),
                down: map(4, 5),
                to_latent: requantization,
            }),
            kinds: vec![StoredKind { input: map(4, 6), output: map(3, 4) }; 2],
            layers: vec![vec![1, -2, 3, -4]],
        }
    }

    fn parse(network: &StoredNetwork) -> Result<StoredNetwork, FormatError> {
        let mut writer = Writer::new();
        network.write(&mut writer);
        let bytes = writer.into_bytes();
        let mut reader = Reader::new("test", &bytes);
        let parsed = StoredNetwork::parse(&mut reader)?;
        reader.end()?;
        Ok(parsed)
    }

    #[test]
    fn a_network_comes_back_with_and_without_a_hidden_layer() {
        for hidden in [false, true] {
            assert_eq!(parse(&network(hidden)), Ok(network(hidden)));
        }
    }

    #[test]
    fn sizes_multipliers_shifts_and_biases_out_of_range_are_errors() {
        let refusal = |change: fn(&mut StoredNetwork)| {
            let mut changed = network(true);
            change(&mut changed);
            parse(&changed).expect_err("out of range").to_string()
        };
        assert!(refusal(|network| network.contexts = 3).contains("network contexts"));
        assert!(refusal(|network| network.width = 0).contains("network width"));
        assert!(refusal(|network| network.unit = 1025).contains("network unit"));
        assert!(refusal(|network| network.to_latent.multiplier = 0).contains("network multiplier"));
        assert!(refusal(|network| network.to_latent.shift = 41).contains("network shift"));
        assert!(refusal(|network| network.layers[0][1] = 1 << 25).contains("network biases"));
        // What is missing is taken from what follows, until nothing does.
        refusal(|network| network.kinds[0].input.weights.truncate(2));
    }
}
