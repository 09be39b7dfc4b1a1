package bench

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"runtime/pprof"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh/bench/internal/load"
	"github.com/meshpresence/mesh/bench/internal/peer"
)

// roleEnv makes the test binary run as one of the processes of a benchmark, which
// receives orders as lines of JSON.
const roleEnv = "MESH_BENCH_ROLE"

// profilesEnv makes a process prepare for a heap profile.
const profilesEnv = "MESH_BENCH_PROFILES"

func TestMain(m *testing.M) {
	if os.Getenv(roleEnv) != "" {
		if os.Getenv(profilesEnv) != "" {
			runtime.MemProfileRate = 16 << 10 // costs a server that allocates a lot some percent
		}
		os.Exit(obey(os.Stdin, os.Stdout))
	}
	os.Exit(m.Run())
}

// order is one line to a process. The field that is set says what to do.
type order struct {
	Serve   *peer.Config
	Fanout  *load.FanoutConfig
	Joins   *load.JoinsConfig
	Hold    *load.HoldConfig
	Memory  bool
	Profile string // write a CPU profile there until the process ends
	Heap    string // write a heap profile there
	Job     string // run one of jobs, with Args
	Args    json.RawMessage
}

// report is the answer to an order.
type report struct {
	Err    string
	Addr   string
	Fanout load.FanoutResult
	Joins  load.JoinsResult
	Memory peer.Memory
	Result json.RawMessage // of a job
}

// obey executes orders until the parent has ended.
func obey(in io.Reader, out io.Writer) int {
	orders := json.NewDecoder(in)
	var held *load.Held
	for {
		var o order
		if orders.Decode(&o) != nil {
			pprof.StopCPUProfile()
			return 0
		}
		var r report
		var err error
		switch {
		case o.Serve != nil:
			var s *peer.Server
			if s, err = peer.Start(context.Background(), *o.Serve); err == nil {
				r.Addr = s.Addr
			}
		case o.Fanout != nil:
			r.Fanout, err = load.Fanout(*o.Fanout)
		case o.Joins != nil:
			r.Joins, err = load.Joins(*o.Joins)
		case o.Hold != nil:
			if held != nil {
				held.Close()
			}
			held, err = load.Hold(*o.Hold)
		case o.Job != "":
			r.Result, err = carryOut(o.Job, o.Args)
		case o.Memory:
			r.Memory, err = peer.ReadMemory()
		case o.Heap != "":
			var f *os.File
			if f, err = os.Create(o.Heap); err == nil {
				err = errors.Join(pprof.Lookup("heap").WriteTo(f, 0), f.Close())
			}
		case o.Profile != "":
			var f *os.File
			if f, err = os.Create(o.Profile); err == nil {
				err = pprof.StartCPUProfile(f)
			}
		}
		if err != nil {
			r.Err = err.Error()
		}
		if json.NewEncoder(out).Encode(r) != nil {
			return 1
		}
	}
}

// process is one of the processes of a benchmark.
type process struct {
	b   testing.TB
	cmd *exec.Cmd
	in  *json.Encoder
	out *json.Decoder
}

// start runs a process until the benchmark ends.
func start(b testing.TB, role string) *process {
	b.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), roleEnv+"="+role, profilesEnv+"="+*profiles)
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	require.NoError(b, err)
	out, err := cmd.StdoutPipe()
	require.NoError(b, err)
	require.NoError(b, cmd.Start())
	b.Cleanup(func() {
		_ = in.Close()
		timer := time.AfterFunc(20*time.Second, func() { _ = cmd.Process.Kill() })
		_ = cmd.Wait()
		timer.Stop()
	})
	return &process{b: b, cmd: cmd, in: json.NewEncoder(in), out: json.NewDecoder(bufio.NewReader(out))}
}

// do sends an order and returns the report.
func (p *process) do(o order) report {
	p.b.Helper()
	require.NoError(p.b, p.in.Encode(o))
	var r report
	require.NoError(p.b, p.out.Decode(&r))
	require.Empty(p.b, r.Err)
	return r
}

// serve starts a server in a process of its own, with a CPU profile if the flag asks for
// one.
func serve(b *testing.B, cfg peer.Config) (p *process, addr string) {
	b.Helper()
	p = start(b, "server")
	addr = p.do(order{Serve: &cfg}).Addr
	if *profiles != "" {
		profiled++
		p.do(order{Profile: fmt.Sprintf("%s/%s-%d.cpu", *profiles, cfg.Kind, profiled)})
	}
	return p, addr
}
