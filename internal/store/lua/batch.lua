-- batch.lua: the beginning of commit.lua. It refuses batches that must not run, and
-- keeps what the ops share.

local inc, number, batch, channels = args[1], args[2], args[3], args[4]

-- A batch that waited in a proxy while a later one ran is dropped as a whole, because
-- its changes were decided again since. The same number again is a retry.
local last = call('GET', keys[1])
if last == 'dead' or last == 'gone' then
  return 'FENCED'
end
if last and tonumber(last) > tonumber(number) then
  return 'LATE'
end
-- If Redis lost everything including the fence, this may be a batch of a server that
-- died long ago. If Redis lacks a batch that it acknowledged, it has gone back or is an
-- old master, and would lose this batch too.
if args[5] == 'i' then
  if not last and not call('ZSCORE', keys[4], inc) then
    return 'LOST'
  end
elseif tonumber(last or '0') < tonumber(args[5]) then
  return 'LOST'
end

-- If Redis is out of memory, it refuses the first write of a script that may take more
-- memory, and allows all writes after any other write. Leaves must always be possible.
-- Other ops are refused one by one.
local full = failed(try('SET', keys[1], number, 'PX', 86400000))
if full then
  call('PEXPIRE', keys[1], 86400000)
  call('SET', keys[1], number, 'PX', 86400000)
end

local mine = ' ' .. inc .. ' ' -- follows the entry id in a record
-- Changes of the owned index: item -> true to add it, false to remove it. They are
-- written at the end, because an entry may join and leave in one call.
local owned = {}
local ki, ai = 4, 7 -- the next keys and arguments
if args[5] == 'i' then
  ki = 5
end
readPositions(ki, tonumber(args[6]))
ki = ki + tonumber(args[6])

stem = batch

-- The arguments of W, P and Q, which belong to the next op.
local newUser, newGrace, newRebuild -- newUser nil: no W
local mostConnections, mostUsers -- 0: no bound
local predecessor, predecessorConnKey, predecessorStateKey
local detail = '' -- more to say in the answer to an op

-- The members key of a room in which an op has to be repeated with its keys. Later ops
-- of that room are repeated too, so that their order is kept.
local waits

local function again()
  waits = members
  return 'k'
end

local function indexed(conn, entry)
  return 'e ' .. conn .. ' ' .. entry .. ' ' .. room
end

local function read(key, conn)
  local v = try('HGET', key, conn)
  if failed(v) then
    return nil, '! ' .. v.err
  end
  if not v then
    return nil, '0'
  end
  return v
end
