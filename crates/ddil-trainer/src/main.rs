//! The program `ddil`.
fn main() {
    let config: ddil_trainer::config::TrainConfig = ddil_trainer::settings::Settings::read(std::path::Path::new(&std::env::args().nth(1).expect("config"))).and_then(|s| s.build()).expect("config");
    ddil_libtorch::keep_freed_pages();
    let task = ddil_trainer::train::TrainTask::new(&config).expect("task");
    let folder = ddil_trainer::run_folder::RunFolder::create(&config.run.path(), &config).expect("folder");
    let sc = ddil_trainer::session::SessionConfig { optimizer: config.optimizer, learning_rate: config.learning_rate, ema: config.ema, output: config.output.clone() };
    let mut s = ddil_trainer::session::Session::start(task, sc, folder).expect("session");
    let i = ddil_trainer::interrupt::Interrupt::listen().expect("i");
    println!("{:?}", s.run(&i));
}
