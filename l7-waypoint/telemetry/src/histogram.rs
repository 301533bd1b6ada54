//! A histogram that many workers may write to without a lock.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use prometheus_client::encoding::{EncodeMetric, MetricEncoder, NoLabelSet};
use prometheus_client::metrics::{MetricType, TypedMetric};

/// Bounds Istio's histograms have (those of Envoy), in the unit of the metric.
const BOUNDS: [f64; 19] =
    [0.5, 1.0, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0, 500.0, 1e3, 2.5e3, 5e3, 1e4, 3e4, 6e4, 3e5, 6e5, 1.8e6, 3.6e6];

/// Counts per bucket and a sum kept in thousandths. A scrape may see a value in a bucket and not yet in the sum.
#[derive(Debug, Default)]
pub struct AtomicHistogram {
    buckets: [AtomicU64; BOUNDS.len() + 1],
    thousandths: AtomicU64,
}

impl AtomicHistogram {
    /// Records a value of `thousandths` / 1000 units.
    pub fn observe_thousandths(&self, thousandths: u64) {
        let value = thousandths as f64 / 1000.0;
        let bucket = BOUNDS.partition_point(|bound| *bound < value);
        self.buckets[bucket].fetch_add(1, Relaxed);
        self.thousandths.fetch_add(thousandths, Relaxed);
    }

    /// Records a whole number of units.
    pub fn observe(&self, value: u64) {
        self.observe_thousandths(value.saturating_mul(1000));
    }
}

impl TypedMetric for AtomicHistogram {
    const TYPE: MetricType = MetricType::Histogram;
}

impl EncodeMetric for AtomicHistogram {
    fn encode(&self, mut encoder: MetricEncoder<'_>) -> Result<(), std::fmt::Error> {
        let counts: Vec<u64> = self.buckets.iter().map(|bucket| bucket.load(Relaxed)).collect();
        let bounds = BOUNDS.iter().copied().chain([f64::MAX]);
        let buckets: Vec<(f64, u64)> = bounds.zip(counts.iter().copied()).collect();
        let sum = self.thousandths.load(Relaxed) as f64 / 1000.0;
        encoder.encode_histogram::<NoLabelSet>(sum, counts.iter().sum(), &buckets, None)
    }

    fn metric_type(&self) -> MetricType {
        Self::TYPE
    }
}
