-- cleanup.lua: ends entries and states of other owners, each only on its ground. The
-- record is the claim: the call that removes it publishes the end, and all others find
-- it gone.
--
-- KEYS[1] rooms index of the bucket, then seq of each room in the order of their R, then
--   members (R), owned and fence (I), conn and state (items)
-- ARGV[1] random tag of the call, also the epoch of rooms that have none
-- ARGV[2] prefix of event channels
-- ARGV[3] expected time of this Redis (unix ms)  ARGV[4] tolerance (ms)
-- ARGV[5] number of rooms
--   then R, a room and '1' if the caller has a rule for it, once per room, followed by the
--   items of the room: name conn entry stateVersion
--   I, without arguments, begins the items of another owner.
--   A name is unique in the call and begins with the ground:
--     t: the per-connection key is gone   s: the key of the state is gone   d: the owner is fenced
--
-- Reply: 'CLOCK', or per item '+' ended now, 'a' the ground does not hold, '0' ended before,
--   '! text' refused

local batch, channels = args[1], args[2]
if math.abs(now - tonumber(args[3])) > tonumber(args[4]) then
  return 'CLOCK'
end

-- If Redis is out of memory it refuses only the first write of a script that may take
-- more. SREM takes none, so after it all writes are allowed: ends are always possible.
try('SREM', keys[1], '')

-- The current owner.
local ownedKey, fenceKey
local fenced -- nil: not read yet
local gone = {} -- items to remove from its index

local function listed(conn, entry)
  return 'e ' .. conn .. ' ' .. entry .. ' ' .. room
end

local function unlist(conn, entry)
  gone[#gone + 1] = listed(conn, entry)
end

local function leaveIndex()
  spread('SREM', ownedKey, gone)
  gone = {}
end

local function dead()
  if fenced == nil then
    local fence = call('GET', fenceKey)
    fenced = fence == 'dead' or fence == 'gone'
  end
  return fenced
end

-- mourn ends an entry of the dead owner that is in its index and has no record.
-- Removing it from the index was the claim.
local function mourn(name, conn, entry, connKey, stateKey)
  call('DEL', connKey, stateKey)
  local err = stand(batch)
  if err then
    return '! ' .. err
  end
  farewell(conn, entry, ' ' .. match(ownedKey, '[^:]+$') .. ' ', batch .. name, 'd')
  return '+'
end

-- judge ends an entry of the current room, or its state. An unknown ground is refused.
local function judge(name, conn, entry, version, connKey, stateKey)
  local mode, cause = sub(name, 1, 1), nil
  if not find('tsd', mode, 1, true) then
    return '! WRONGFORMAT unknown ground'
  end
  local v = try('HGET', members, conn)
  if failed(v) then
    return '! ' .. v.err
  end
  local id, inc
  if v then
    id, inc = match(v, '^(%S+)( %S+ )')
  end
  if id ~= entry then
    if not v and mode == 'd' and dead() and call('SREM', ownedKey, listed(conn, entry)) == 1 then
      return mourn(name, conn, entry, connKey, stateKey)
    end
    unlist(conn, entry)
    return '0'
  end
  local _, stop, ttl, _, sl, sv, meta, mv, ml, til, joined = find(v, REST, #entry + #inc + 1)
  if not stop then
    return '! ' .. ODD
  end
  if mode == 's' then
    if sl == '0' or sv ~= version then
      return '0'
    end
    if til == '0' or call('EXISTS', stateKey) == 1 then
      return 'a'
    end
  elseif mode == 't' then
    if ttl == '0' or call('EXISTS', connKey) == 1 then
      return 'a'
    end
    cause = 's'
  else
    if not dead() then
      return 'a'
    end
    cause = 'd'
  end
  local err = stand(batch)
  if err then
    return '! ' .. err
  end
  if mode == 's' then
    advance(batch .. name)
    local who = entry .. inc .. ttl .. ' 0 ' .. sv .. ' . '
    local since = '0 ' .. joined .. ' ' .. seq .. '\n'
    call('HSET', members, conn, who .. meta .. since .. sub(v, stop + 1, stop + tonumber(ml)))
    call('DEL', stateKey)
    publish('S', '.', conn, who .. mv .. ' 0 ' .. since)
    return '+'
  end
  if ttl == '0' and sl == '0' then
    connKey = nil -- it has no keys of its own
  end
  remove(conn, entry, inc, connKey, stateKey, batch .. name, cause)
  unlist(conn, entry)
  return '+'
end

local total = tonumber(args[5])
readPositions(2, total)
local reply = {}

local function judgeAll()
  local ki, ai = 2 + total, 6
  while ai <= #args do
    if args[ai] == 'R' then
      enter(args[ai + 1], args[ai + 2], keys[ki], channels)
      ki, ai = ki + 1, ai + 3
    elseif args[ai] == 'I' then
      leaveIndex()
      ownedKey, fenceKey, fenced = keys[ki], keys[ki + 1], nil
      ki, ai = ki + 2, ai + 1
    else
      reply[#reply + 1] = judge(args[ai], args[ai + 1], args[ai + 2], args[ai + 3], keys[ki], keys[ki + 1])
      ki, ai = ki + 2, ai + 4
    end
  end
end

local stopped = attempt(judgeAll, keys[1])
leaveIndex()
return stopped or reply
