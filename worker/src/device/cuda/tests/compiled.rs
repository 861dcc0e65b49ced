//! Every kernel through NVRTC, which needs no GPU: it compiles for each architecture, and within its registers.

use std::collections::HashMap;

use super::skip;
use crate::device::cuda::compile::Compiler;
use crate::device::cuda::error::CudaError;
use crate::device::cuda::kernels::MODULES;

/// Each kernel's most registers for sm_80 and sm_90: the table in the kernels' description.
fn limits() -> HashMap<&'static str, [Option<u32>; 2]> {
    let text = include_str!("../../../../kernels/README.md");
    let row = |line: &'static str| {
        let cells: Vec<&str> = line.split('|').map(str::trim).collect();
        let name = cells.get(1)?.strip_prefix('`')?.strip_suffix('`')?;
        Some((name, [cells.get(3)?.parse().ok(), cells.get(4)?.parse().ok()]))
    };
    text.lines().filter_map(row).collect()
}

/// What ptxas says of one kernel.
#[derive(Debug, PartialEq, Eq)]
struct Usage {
    kernel: String,
    registers: u32,
    spilled: u32,
}

/// Reads the log of `--ptxas-options=-v`.
fn usage(log: &str) -> Vec<Usage> {
    let number_before =
        |line: &str, word: &str| -> Option<u32> { line.split(word).next()?.split_whitespace().last()?.parse().ok() };
    let mut found: Vec<Usage> = Vec::new();
    for line in log.lines() {
        if let Some(rest) = line.split("Compiling entry function '").nth(1) {
            let kernel = rest.split('\'').next().unwrap_or_default().to_string();
            found.push(Usage { kernel, registers: 0, spilled: 0 });
        }
        let Some(last) = found.last_mut() else { continue };
        if line.contains("bytes spill stores") {
            last.spilled = number_before(line, " bytes spill stores").unwrap_or(u32::MAX);
        }
        if let Some(rest) = line.split("Used ").nth(1).filter(|_| line.contains(" registers")) {
            last.registers = number_before(rest, " registers").unwrap_or(u32::MAX);
        }
    }
    found
}

#[test]
fn every_kernel_compiles_without_spilling_registers() {
    let compiler = match Compiler::new(None) {
        Ok(compiler) => compiler,
        Err(error) => return skip(&format!("kernels are not compiled: {error}")),
    };
    let limits = limits();
    for (column, capability) in [(8, 0), (9, 0)].into_iter().enumerate() {
        for module in MODULES.iter().filter(|module| module.fits(capability)) {
            let architecture = &module.architecture(capability);
            let compiled = compiler.compile(module, architecture).unwrap_or_else(|error| panic!("{error}"));
            assert!(compiled.cubin.starts_with(b"\x7fELF"), "{} for {architecture}", module.file);
            let mut used = usage(&compiled.log);
            used.sort_by_key(|usage| module.kernels.iter().position(|kernel| *kernel == usage.kernel));
            let names: Vec<&str> = used.iter().map(|usage| usage.kernel.as_str()).collect();
            assert_eq!(names, module.kernels, "{} has other kernels than are launched\n{}", module.file, compiled.log);
            // What the assembler says where it makes products of warpgroups wait for each other.
            assert!(!compiled.log.contains("C75"), "{}", compiled.log);
            for Usage { kernel, registers, spilled } in used {
                assert_eq!(spilled, 0, "{kernel} spills bytes for {architecture}\n{}", compiled.log);
                let most = limits.get(kernel.as_str()).and_then(|most| most[column]);
                let most = most.unwrap_or_else(|| panic!("the table has no registers of {kernel} for {architecture}"));
                assert!(
                    (1..=most).contains(&registers),
                    "{kernel} for {architecture}: {registers} of {most} registers"
                );
            }
        }
    }
}

#[test]
fn a_mistake_in_a_kernel_is_told_with_its_place() {
    let Ok(compiler) = Compiler::new(None) else { return skip("there is no libnvrtc") };
    let module = crate::device::cuda::kernels::Module {
        file: "wrong.cu",
        text: "extern \"C\" __global__ void wrong(float* x) { x[0] = y; }",
        defines: &[],
        kernels: &["wrong"],
        needs: None,
    };
    let Err(CudaError::Compile { file, architecture, log }) = compiler.compile(&module, "sm_90") else {
        panic!("it compiled")
    };
    assert_eq!((file, architecture.as_str()), ("wrong.cu", "sm_90"));
    assert!(log.contains("wrong.cu(1)") && log.contains("\"y\""), "{log}");
}

#[test]
fn a_cubin_is_compiled_once_for_each_source_and_architecture() {
    let folder = tempfile::tempdir().unwrap();
    let Ok(compiler) = Compiler::new(Some(folder.path().join("k"))) else { return skip("there is no libnvrtc") };
    let files = || std::fs::read_dir(folder.path().join("k")).unwrap().count();
    let module = &MODULES[0];
    let cubin = compiler.cubin(module, "sm_90").unwrap();
    assert_eq!((compiler.cubin(module, "sm_90").unwrap(), files()), (cubin.clone(), 1));
    assert_ne!(compiler.cubin(module, "sm_80").unwrap(), cubin);
    assert_eq!(files(), 2);
}

#[test]
fn the_compilers_log_is_read_as_it_is_written() {
    let log = "ptxas info    : Compiling entry function 'axpy' for 'sm_90'\n\
               ptxas info    : Function properties for axpy\n    0 bytes stack frame, 12 bytes spill stores, \
               8 bytes spill loads\nptxas info    : Used 26 registers, used 1 barriers, 380 bytes cmem[0]\n";
    let expected = [Usage { kernel: "axpy".into(), registers: 26, spilled: 12 }];
    assert_eq!(usage(log), expected);
}

#[test]
fn products_of_warpgroups_are_for_one_capability_alone() {
    let with = |capability| MODULES.iter().filter(|module| module.fits(capability)).count();
    assert_eq!((with((9, 0)), with((8, 0)), with((10, 0))), (MODULES.len(), MODULES.len() - 1, MODULES.len() - 1));
    let group = MODULES.iter().find(|module| module.needs.is_some()).unwrap();
    assert_eq!((group.architecture((9, 0)), MODULES[0].architecture((9, 0))), ("sm_90a".into(), "sm_90".into()));
}
