"""Runs one training job as N processes of M CPU devices each on this machine, as a pod would run it on N hosts.

  python launch/local.py --num_processes=2 --devices=2 -- --config=configs/gpt_small.py --config.num_steps=100

  python launch/local.py --num_processes=4 -- evaluate runs/gpt_small --mesh=fsdp=4

Arguments after `--` are a command of llm-jax with its flags; without a command, flags of train. The output of process 0
is shown; that of another process only if it failed differently. Ctrl-C, SIGTERM and SIGHUP are forwarded. The exit code
is that of the process that failed for a reason of its own: 76, and the death by a signal, are often consequences.
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--num_processes', type=int, default=2)
  parser.add_argument('--devices', type=int, default=1, help='virtual CPU devices of each process')
  parser.add_argument('rest', nargs=argparse.REMAINDER, help='-- and a command of llm-jax, or the flags of train')
  args = parser.parse_args()
  flags = args.rest[1:] if args.rest[:1] == ['--'] else args.rest
  command = ['llm_jax.main', '--distributed', *flags]
  if flags and not flags[0].startswith('-'):
    command = ['llm_jax', *flags, '--distributed']

  # Signals are queued for the loop below, so that each reaches all processes, including those not yet started.
  signals: list[int] = []
  for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup does
      signal.signal(number, lambda number, frame: signals.append(number))

  with socket.socket() as s:  # a free port for the coordinator, on the loopback only
    s.bind(('127.0.0.1', 0))
    address = f'127.0.0.1:{s.getsockname()[1]}'
  processes, outputs = [], []
  for i in range(args.num_processes):
    env = os.environ | {
        'JAX_PLATFORMS': 'cpu', 'JAX_NUM_CPU_DEVICES': str(args.devices), 'JAX_NUM_PROCESSES': str(args.num_processes),
        'JAX_PROCESS_ID': str(i), 'JAX_COORDINATOR_ADDRESS': address, 'JAX_COORDINATOR_BIND_ADDRESS': address}
    output = None if i == 0 else tempfile.TemporaryFile('w+')  # noqa: SIM115
    # Its own session, so that the terminal's Ctrl-C reaches a process once, through this launcher.
    processes.append(subprocess.Popen([sys.executable, '-m', *command], env=env, stdout=output,
                                      stderr=output and subprocess.STDOUT, start_new_session=True))
    outputs.append(output)
  print(f'processes {" ".join(str(process.pid) for process in processes)}, coordinator {address}', flush=True)

  ended: list[int] = []  # in order of time
  deadline = float('inf')
  while len(ended) < len(processes):
    time.sleep(0.1)
    running = [i for i in range(len(processes)) if i not in ended]
    ended += [i for i in running if processes[i].poll() is not None]
    if any(processes[i].returncode for i in ended):
      deadline = min(deadline, time.monotonic() + (10 if any(processes[i].returncode == 76 for i in ended) else 60))
    if time.monotonic() > deadline:
      signals.append(signal.SIGKILL)  # for processes that still wait for the failed one
    while signals:
      number = signals.pop(0)
      for i in running:
        processes[i].send_signal(number)  # has no effect on a process that has ended
  codes = [code if code >= 0 else 128 - code for code in (process.returncode for process in processes)]
  for i, (code, output) in enumerate(zip(codes, outputs, strict=True)):
    # A UserError is shown once. Exit code 1 is a traceback, and that of process 0 may only report the loss of this one.
    if output is not None and code and (code == 1 or (code != codes[0] and (code != 76 or codes[0] >= 128))):
      output.seek(0)
      print(f'--- process {i} ended with {code}:\n{output.read()[-4000:]}', file=sys.stderr)
  return min((codes[i] for i in ended), key=severity)


def severity(code: int) -> int:
  """The order of exit codes, the most telling first: own errors, lost processes, deaths by signals, stops."""
  kinds = [code in (65, 70, 74, 78), 0 < code < 75, code == 76, code >= 128, code == 75]
  return kinds.index(True) if True in kinds else len(kinds)


if __name__ == '__main__':
  sys.exit(main())
