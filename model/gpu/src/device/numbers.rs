//! Numbers from bits, and the elementwise functions of `kernels::math`.

use cubecl::prelude::*;

/// The f16 in the low half of `bits`, exactly.
#[cube]
pub fn half_to_f32(bits: u32) -> f32 {
    let sign = (bits & 0x8000u32) << 16u32;
    let exponent = (bits >> 10u32) & 31u32;
    let mantissa = bits & 1023u32;
    let normal = ((bits & 0x7FFFu32) << 13u32) + 0x3800_0000u32;
    // 2^-24 times an integer: what subnormals are.
    let subnormal = u32::reinterpret(f32::cast_from(mantissa) * 5.960_464_5e-8f32);
    let special = (mantissa << 13u32) | 0x7F80_0000u32;
    let finite = select(exponent == 0u32, subnormal, normal);
    f32::reinterpret(select(exponent == 31u32, special, finite) | sign)
}

/// `kernels::math::exp`.
#[cube]
pub fn exp(x: f32) -> f32 {
    let low = -87.0f32;
    let high = 88.722_84f32;
    let clamped = select(x > high, high, x);
    let clamped = select(clamped < low, low, clamped);
    let n = f32::round(clamped * 1.442_695f32);
    let r = clamped - n * 0.693_359_4f32 - n * -2.121_944_4e-4f32;
    let mut p = 1.987_569_1e-4f32;
    p = p * r + 1.398_2e-3f32;
    p = p * r + 8.333_452e-3f32;
    p = p * r + 4.166_579_6e-2f32;
    p = p * r + 1.666_666_5e-1f32;
    p = p * r + 0.5f32;
    let mantissa = p * (r * r) + r + 1.0f32;
    let whole = i32::cast_from(n);
    let half = whole >> 1i32;
    let first = f32::reinterpret(u32::cast_from(half + 127i32) << 23u32);
    let second = f32::reinterpret(u32::cast_from(whole - half + 127i32) << 23u32);
    let value = mantissa * first * second;
    let value = select(x < low, 0.0f32, value);
    // Infinity and NaN are no constants of every shading language, and comparisons may be held to be of numbers.
    let value = select(x > high, x * 3.0e38f32, value);
    select(u32::reinterpret(x) & 0x7FFF_FFFFu32 > 0x7F80_0000u32, x, value)
}

/// `kernels::math::silu`.
#[cube]
pub fn silu(x: f32) -> f32 {
    x / (1.0f32 + exp(-x))
}
